"""What `serve` shows."""

from __future__ import annotations

import json

import msgspec
import pytest

from penstock.cli.report import (
    Answered,
    Asked,
    AskFailed,
    Event,
    Printer,
    Ready,
    Said,
    Starting,
    Stopping,
    phases,
    print_json,
)
from penstock.request import Timeline

TIMELINE = Timeline(
    decode_worker="decode-0",
    prefill_worker="prefill-0",
    path="in-place",
    prompt_tokens=20,
    cached_tokens=4,
    computed_tokens=16,
    moved_tokens=16,
    output_tokens=11,
    prefill_started_s=0.004,
    prefill_ended_s=0.010,
    first_token_s=0.011,
    decoding_s=0.013,
    ended_s=0.111,
)
READY = Ready(
    "demo", "http://h:1", "h:2", {"decode-0": "decode"}, {"decode-0": 7}, "curl [x]", "penstock worker --join h:2"
)
STORY: tuple[Event, ...] = (
    Starting("demo", 3),
    READY,
    Asked("What is [bold]?"),
    Said("An "),
    Said("[answer]."),
    Answered(msgspec.structs.asdict(TIMELINE)),
    AskFailed("no [way]"),
    Stopping(),
)


def test_people_read_text(capsys: pytest.CaptureFixture[str]) -> None:
    with Printer(new_token="hush") as show:
        for event in STORY:
            show(event)
    text = capsys.readouterr().out
    for part in (
        "demo is served on http://h:1 by decode-0; Ctrl-C",
        "  curl [x]\n",
        "  PENSTOCK_TOKEN=... penstock worker --join h:2\n",
        "What is [bold]?\n",
        "An [answer].\n",
        "in-place, 0 bytes copied for 16 tokens",
        "no [way]",
        "stopping",
    ):
        assert part in text
    assert "hush" not in text  # not a terminal, so perhaps a log
    assert "\x1b" not in text


def test_scripts_read_json(capsys: pytest.CaptureFixture[str]) -> None:
    for event in STORY:
        print_json(event)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == [type(event).__name__.lower() for event in STORY]
    assert lines[1]["pids"] == {"decode-0": 7}
    assert lines[5]["timeline"]["copied_bytes"] == 0


def test_phases_say_where_the_time_went() -> None:
    assert dict(phases(TIMELINE)) == {
        "queue": "   4.0 ms  until the first chunk started",
        "prefill": "   6.0 ms  16 of 20 prompt tokens computed by prefill-0",
        "hand-over": "   3.0 ms  in-place, 0 bytes copied for 16 tokens; includes the first decode step",
        "first token": "  11.0 ms  after the request came",
        "decode": "   100 tokens/s, 11 tokens by decode-0",
    }


def test_phases_that_were_not_reached_are_left_out() -> None:
    assert dict(phases(Timeline())) == {}
    local = msgspec.structs.replace(TIMELINE, moved_tokens=0, decoding_s=None, output_tokens=1)
    assert list(dict(phases(local))) == ["queue", "prefill", "first token"]
