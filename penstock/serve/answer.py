"""One request on its way: its tokens become text, events, counts and a record of what happened. Used by `frontend`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from penstock import metrics
from penstock.clock import now
from penstock.errors import EngineFailed, PenstockError
from penstock.request import Finish, FinishReason, Request, Timeline, Token
from penstock.serve import openai
from penstock.serve.decisions import Compared, Decided
from penstock.serve.openai import Ask, Dialect, Heading, Shown, Usage
from penstock.serve.text import Tokenizer


class Record(msgspec.Struct):
    """What /debug/requests/{id} shows; the list of /debug/requests has its head. No prompt, and no answer.

    `timeline` is what the workers have told so far. `decisions` are filled in when it is shown; `compared` is of the
    one that gave the first token.
    """

    id: str
    model: str
    created: int
    state: Literal["running", "finished", "failed", "cancelled"] = "running"
    finish_reason: str | None = None
    error: str | None = None
    timeline: Timeline | None = None
    decisions: list[Decided] = []
    compared: list[Compared] = []


class Answer:
    """One request on its way: what was asked, and what came of it so far."""

    def __init__(
        self,
        ask: Ask,
        dialect: Dialect,
        request: Request,
        tokenizer: Tokenizer,
        heading: Heading,
        series: metrics.ModelMetrics,
        arrived_s: float,
    ) -> None:
        self.ask = ask
        self.request = request
        self.arrived_s = arrived_s
        self.is_complete = False
        self.record = Record(heading.id, heading.model, heading.created)
        self._dialect = dialect
        self._heading = heading
        self._spell = tokenizer.spell
        self._output = tokenizer.output(ask.stop, dialect.is_continuation)
        self._events = dialect.events(heading, ask.wants_usage)
        self._series = series
        self._finish: Finish | None = None
        self._tokens = 0
        self._last_s: float | None = None  # when the last tokens came
        self._shown: list[Shown] = []
        self._chars = 0

    @property
    def opening(self) -> bytes:
        return self._events.opening

    def take(self, tokens: Sequence[Token], finish: Finish | None, at_s: float) -> list[str]:
        """What each of these tokens adds to the text, up to a stop string. A token that ended the answer is no text."""
        self._note_times(len(tokens), at_s)
        if finish is not None:
            self._finish = finish
            self.is_complete = True
            if finish.reason == "abort":
                raise EngineFailed("the worker gave the request up")
            if finish.stop_token is not None:
                self._tokens += 1
                tokens = tokens[:-1]
        texts = []
        for token in tokens:
            texts.append(self._output.push(token.id))
            if self._output.is_stopped:
                self.is_complete = True
                break
        self._tokens += len(texts)
        if self.ask.logprobs is not None:
            self._note_logprobs(tokens, texts)
        return texts

    def events(self, tokens: Sequence[Token], finish: Finish | None, at_s: float) -> bytes:
        """One event for each token of the text, see `take`."""
        texts = self.take(tokens, finish, at_s)
        if self.ask.logprobs is None:
            return b"".join([self._events.token(text) for text in texts])
        shown = self._shown[len(self._shown) - len(texts) :]
        return b"".join(
            self._events.token_logprobs(text, self._dialect.logprobs([one], self._spell))
            for text, one in zip(texts, shown, strict=True)
        )

    def closing(self) -> bytes:
        """The events after the last token's."""
        text = self._output.finish()
        reason, usage, timeline = self._settle()
        events = [self._events.finish(text, reason, timeline if self.ask.wants_timeline else None)]
        if self.ask.wants_usage:
            events.append(self._events.usage(usage))
        return b"".join((*events, openai.DONE))

    def body(self, text: str) -> bytes:
        """The whole answer, given the text of all tokens."""
        text += self._output.finish()
        reason, usage, timeline = self._settle()
        logprobs = None if self.ask.logprobs is None else self._dialect.logprobs(self._shown, self._spell)
        shown = timeline if self.ask.wants_timeline else None
        return self._dialect.answer(self._heading, text, reason, logprobs, usage, shown)

    def fail(self, error: PenstockError) -> None:
        self.record.state = "failed"
        self.record.error = f"{type(error).__name__}: {error}"
        self.record.timeline = self._timeline()

    def cancel(self, why: BaseException) -> None:
        """The client is gone. Nothing changes if it had its answer."""
        if self.record.state != "running":
            return
        metrics.count(self._series.finished, "abort")
        self.record.state = "cancelled"
        self.record.error = str(why)
        self.record.timeline = self._timeline()

    def _note_times(self, tokens: int, at_s: float) -> None:
        if not tokens:
            return
        series = self._series
        if self._last_s is None:
            series.ttft_s.observe(at_s - self.arrived_s)
            series.prompt_tokens += self.request.prompt_tokens
        else:
            series.itl_s.observe((at_s - self._last_s) / tokens, tokens)
        self._last_s = at_s
        series.generation_tokens += tokens

    def _note_logprobs(self, tokens: Sequence[Token], texts: Sequence[str]) -> None:
        for token, text in zip(tokens, texts, strict=False):  # after a stop string there are more tokens than texts
            self._shown.append(Shown(token, self._chars))
            self._chars += len(text)

    def _settle(self) -> tuple[FinishReason, Usage, Timeline]:
        """The answer is complete: what is to be said and kept of it."""
        finish, timeline = self._finish, self._timeline()
        reason: FinishReason = "stop" if finish is None or self._output.is_stopped else finish.reason
        cached = None if self.record.timeline is None else timeline.cached_tokens
        self.record.state = "finished"
        self.record.finish_reason = reason
        self.record.timeline = timeline
        self._series.e2e_s.observe(now() - self.arrived_s)
        self._series.stream_moves += timeline.moves
        metrics.count(self._series.finished, reason)
        started_s, ended_s = timeline.prefill_started_s, timeline.prefill_ended_s
        if started_s is not None and ended_s is not None:
            self._series.queue_s.observe(started_s)
            self._series.prefill_s.observe(ended_s - started_s)
        return reason, Usage(self.request.prompt_tokens, self._tokens, cached), timeline

    def _timeline(self) -> Timeline:
        """The workers', completed by what is known here if they were stopped before they could tell the end."""
        if self._finish is not None:
            return self._finish.timeline
        told = self.record.timeline or Timeline(prompt_tokens=self.request.prompt_tokens)
        return msgspec.structs.replace(told, output_tokens=self._tokens, ended_s=now() - self.arrived_s)
