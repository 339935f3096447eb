"""What `penstock serve` tells while it runs: events, as text for people or as JSON for scripts.

Starting -> Ready -> (Asked -> Said ... -> Answered | AskFailed) -> Stopping
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import msgspec
from rich.console import Console
from rich.status import Status

from penstock.request import Timeline


@dataclass(frozen=True, slots=True)
class Starting:
    model: str
    processes: int


@dataclass(frozen=True, slots=True)
class Ready:
    """`curl` and `join_command` are commands: one asks something, one adds a worker to the registry at `join`."""

    model: str
    url: str
    join: str
    workers: Mapping[str, str]  # role by name
    pids: Mapping[str, int]  # of the frontend too
    curl: str
    join_command: str


@dataclass(frozen=True, slots=True)
class Asked:
    question: str


@dataclass(frozen=True, slots=True)
class Said:
    text: str


@dataclass(frozen=True, slots=True)
class Answered:
    timeline: Mapping[str, object]  # the fields of request.Timeline


@dataclass(frozen=True, slots=True)
class AskFailed:
    reason: str


@dataclass(frozen=True, slots=True)
class Stopping:
    pass


Event = Starting | Ready | Asked | Said | Answered | AskFailed | Stopping
Report = Callable[[Event], None]


def print_json(event: Event) -> None:
    """One JSON object a line: the fields of the event, and its name as `event`."""
    try:
        print(json.dumps({"event": type(event).__name__.lower(), **asdict(event)}), flush=True)
    except BrokenPipeError:  # whoever read this has heard enough; serving goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Printer:
    """Prints events for people; used in a `with`, whose end leaves the terminal as it was.

    `new_token` is the token that workers need, if its owner has not seen it yet.
    """

    def __init__(self, new_token: str) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._token = new_token if self._console.is_terminal and new_token else "..."  # logs keep no secrets
        self._status: Status | None = None

    def __enter__(self) -> Printer:
        return self

    def __exit__(self, *_: object) -> None:
        self._settle()

    def __call__(self, event: Event) -> None:
        console = self._console
        match event:
            case Starting():
                self._status = console.status(f"starting {event.processes} processes to serve {event.model} ...")
                self._status.start()
            case Ready():
                self._settle()
                self._show_ready(event)
            case Asked():
                console.print(event.question, style="bold", markup=False)
            case Said():
                console.out(event.text, end="", highlight=False)
            case Answered():
                console.print("\n")
                for phase, what in phases(msgspec.convert(dict(event.timeline), Timeline)):
                    console.print(f"  {phase:12} {what}", markup=False)
                console.print()
            case AskFailed():
                console.print(f"\nthe question was not answered: {event.reason}\n", markup=False)
            case Stopping():
                self._settle()
                console.print("stopping ...")

    def _settle(self) -> None:
        if self._status is not None:
            self._status.stop()

    def _show_ready(self, ready: Ready) -> None:
        names = ", ".join(ready.workers)
        self._console.print(f"\n[bold]{ready.model}[/] is served on [bold]{ready.url}[/] by {names}; Ctrl-C stops them")
        for title, line in (
            ("ask it", ready.curl),
            ("add a worker", f"PENSTOCK_TOKEN={self._token} {ready.join_command}"),
        ):
            self._console.print(f"\n{title}:\n  {line}", markup=False)
        self._console.print()


def phases(timeline: Timeline) -> Iterator[tuple[str, str]]:
    """Where one request's time went, as (phase, words). Phases that it did not reach are left out."""
    started, prefilled, first = timeline.prefill_started_s, timeline.prefill_ended_s, timeline.first_token_s
    decoding, ended = timeline.decoding_s, timeline.ended_s
    if started is not None:
        yield "queue", f"{_ms(started)}  until the first chunk started"
    if started is not None and prefilled is not None:
        tokens = f"{timeline.computed_tokens} of {timeline.prompt_tokens} prompt tokens"
        yield "prefill", f"{_ms(prefilled - started)}  {tokens} computed by {timeline.prefill_worker}"
    if timeline.moved_tokens and prefilled is not None and decoding is not None:
        moved = f"{timeline.path}, {timeline.copied_bytes} bytes copied for {timeline.moved_tokens} tokens"
        yield "hand-over", f"{_ms(decoding - prefilled)}  {moved}; includes the first decode step"
    if first is not None:
        yield "first token", f"{_ms(first)}  after the request came"
    if first is not None and ended is not None and timeline.output_tokens > 1 and ended > first:
        pace = (timeline.output_tokens - 1) / (ended - first)
        yield "decode", f"{pace:6.0f} tokens/s, {timeline.output_tokens} tokens by {timeline.decode_worker}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:6.1f} ms"
