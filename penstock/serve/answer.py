"""An answer on its way: tokens become text, events, counts and a record of what happened. Used by `frontend`.

An answer has one choice, or several: `n` for each prompt. Each choice is a request of its own to the workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from penstock import metrics
from penstock.clock import now
from penstock.errors import EngineFailed, PenstockError
from penstock.request import Finish, Request, Timeline, Token
from penstock.serve import openai
from penstock.serve.asks import Ask
from penstock.serve.decisions import Compared, Decided
from penstock.serve.detokenizer import Output
from penstock.serve.intake import Told
from penstock.serve.openai import Dialect, Ending, Fields, Heading, Shown, Usage
from penstock.serve.parsed import Parsed
from penstock.serve.parsers import forced
from penstock.serve.parsers.api import Turn
from penstock.serve.stop_strings import StopFinder
from penstock.serve.text import Tokenizer
from penstock.serve.tools import call_id
from penstock.tokens import unpack

AT_A_TIME = 64  # tokens whose log probabilities are written between two turns of the event loop

_encode = msgspec.json.Encoder().encode


class Record(msgspec.Struct):
    """What /debug/requests/{id} shows of a choice; the list of /debug/requests has its head. No prompt, and no answer.

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


@dataclass(frozen=True, slots=True)
class Manner:
    """What all choices of an answer share."""

    ask: Ask
    dialect: Dialect
    heading: Heading
    tokenizer: Tokenizer
    series: metrics.ModelMetrics
    arrived_s: float

    def spell(self, token: int) -> bytes:
        """What a token is called among log probabilities."""
        return b"token_id:%d" % token if self.ask.names_tokens_by_id else self.tokenizer.spell(token)

    def output(self, is_parsed: bool) -> Output:
        """Where the tokens of a choice become text. Parsers see their markers, though special tokens are no text."""
        ask = self.ask
        stops = StopFinder(ask.stop, ask.includes_stop) if ask.stop else None
        shown = None if ask.shows_special else self.tokenizer.formats.keeps() if is_parsed else ()
        goes_on = self.dialect.is_continuation or (ask.chat is not None and ask.chat.continue_final_message)
        return self.tokenizer.output(stops, goes_on, ask.min_tokens, shown)

    def parsed(self, request: Request, index: int, prompt_end: str) -> Parsed | None:
        """What reads a chat's answer where it may be more than text."""
        tools = self.ask.tools
        turn = Turn(tools.callable_names, prompt_end, tools.is_parallel)
        if tools.choice.mode == "required":
            parser = forced.required(turn)
        elif tools.choice.mode == "named":
            parser = forced.named(tools.choice.name)
        elif "guide" in self.ask.given:  # what it describes is the answer, with no room for the model's own markers
            return None
        elif self.ask.chat is not None and self.tokenizer.formats.may_parse(turn):
            parser = self.tokenizer.formats.parser(turn)
        else:
            return None
        return Parsed(parser, lambda call: call_id(request.id, index, call), self.ask.shows_reasoning)

    def logprobs(self, shown: Sequence[Shown]) -> Fields | None:
        return None if self.ask.logprobs is None else self.dialect.logprobs(shown, self.spell)

    async def all_logprobs(self, shown: Sequence[Shown]) -> Fields | None:
        """The same of many tokens, which may take a while."""
        whole = self.logprobs(shown[:AT_A_TIME])
        for start in range(AT_A_TIME, len(shown), AT_A_TIME):
            await asyncio.sleep(0)
            for name, values in (self.logprobs(shown[start : start + AT_A_TIME]) or {}).items():
                if whole is not None and isinstance(every := whole[name], list) and isinstance(values, list):
                    every += [msgspec.Raw(_encode(value)) for value in values]
        return whole


class Answer:
    """What was asked, and what came of it so far."""

    def __init__(self, manner: Manner, requests: Sequence[Request], prompts: Sequence[Told]) -> None:
        """`requests` prompt by prompt, `best_of` for each."""
        self.ask = manner.ask
        self.arrived_s = manner.arrived_s
        self._manner = manner
        self.choices: list[Choice] = []
        for index, request in enumerate(requests):
            prompt, number = divmod(index, self.ask.best_of)
            leader = self.choices[index - number] if number else None
            self.choices.append(Choice(manner, index, request, prompts[prompt], leader))

    @property
    def timeout_s(self) -> float:
        return self.choices[0].request.timeout_s

    def closing(self) -> bytes:
        """The events after those of all choices."""
        if not self.ask.wants_usage:
            return openai.DONE
        return self.choices[0].usage_event(self._usage()) + openai.DONE

    async def body(self) -> bytes:
        """The whole answer, of complete choices."""
        manner, chosen = self._manner, self._best()
        rendered = [await choice.render(index) for index, choice in enumerate(chosen)]
        for choice in self.choices:
            choice.pass_over()
        first = chosen[0]
        more: Fields = {}
        if self.ask.chat is not None:
            more |= await first.of_prompt()
        if self.ask.wants_timeline:
            more |= first.timeline_fields()
        return manner.dialect.answer(manner.heading, rendered, self._usage(), more)

    def fail(self, error: PenstockError) -> None:
        for choice in self.choices:
            choice.fail(error)

    def cancel(self, why: BaseException) -> None:
        """The client is gone. Nothing changes if it had its answer."""
        for choice in self.choices:
            choice.cancel(why)

    def _best(self) -> list[Choice]:
        """Of each prompt's choices the `n` whose tokens are likeliest in the mean, in the order of likelihood."""
        n, best_of = self.ask.n, self.ask.best_of
        if best_of == n:
            return self.choices
        by_prompt = [self.choices[start : start + best_of] for start in range(0, len(self.choices), best_of)]
        return [one for same in by_prompt for one in sorted(same, key=lambda each: -each.mean_logprob)[:n]]

    def _usage(self) -> Usage:
        leaders = [choice for choice in self.choices if choice.leader is None]
        cached = [choice.cached_tokens for choice in leaders]
        known = [tokens for tokens in cached if tokens is not None]
        return Usage(
            prompt_tokens=sum(choice.request.prompt_tokens for choice in leaders),
            output_tokens=sum(choice.tokens for choice in self.choices),
            cached_tokens=sum(known) if known else None,
        )


class Choice:
    """One output of an answer."""

    def __init__(self, manner: Manner, index: int, request: Request, prompt: Told, leader: Choice | None) -> None:
        """`leader` is the first choice of the same prompt; None: this is it."""
        heading = manner.heading
        self.index = index
        self.request = request
        self.leader = leader
        self.tokens = 0  # of output, that count as used
        self.is_complete = False
        self.has_begun = asyncio.Event()
        self.record = Record(manner.dialect.id_prefix + request.id, heading.model, heading.created)
        self.prompt_logprobs: Sequence[Token] = ()
        self._manner = manner
        self._ask = manner.ask
        self._parsed = manner.parsed(request, index, prompt.end)
        self._output = manner.output(is_parsed=self._parsed is not None)
        self._events = manner.dialect.events(heading, manner.ask.wants_usage, index)
        self._echoed = prompt.echoed
        self._texts: list[str] = []
        self._is_plain = manner.ask.logprobs is None and not manner.ask.shows_token_ids
        self._finish: Finish | None = None
        self._last_s: float | None = None  # when the last tokens came
        self._shown: list[Shown] = []  # those that no event told yet
        self._logprob = 0.0  # of all tokens
        self._chars = len(self._echoed)

    @property
    def cached_tokens(self) -> int | None:
        return None if self.record.timeline is None else self.record.timeline.cached_tokens

    @property
    def mean_logprob(self) -> float:
        return self._logprob / max(1, self.tokens)

    # As events

    async def opening(self) -> bytes:
        """The events before the first token's."""
        more: Fields = {"prompt_token_ids": list(unpack(self.request.prompt))} if self._ask.shows_token_ids else {}
        if self._ask.chat is not None:
            return self._events.opening(more)
        if not self._echoed and not more:
            return b""
        echoed = await self._echoed_tokens()
        logprobs = await self._manner.all_logprobs(echoed) if echoed else None
        return self._events.token_with(self._echoed, logprobs, more)

    def events(self, tokens: Sequence[Token], finish: Finish | None, at_s: float) -> bytes:
        """One event for each token of the text."""
        texts = self._take(tokens, finish, at_s)
        if self._parsed is not None:
            return self._parsed_events(self._parsed, texts)
        if self._is_plain:
            return b"".join([self._events.token(text) for text in texts])
        shown, self._shown = self._shown, []
        return b"".join([self._event_of(text, one) for text, one in zip(texts, shown, strict=True)])

    def closing(self) -> bytes:
        """The last events of this choice."""
        text, before = self._output.finish(), b""
        logprobs: Fields | None = None
        untold: Fields = {}
        if self._parsed is not None:
            before = b"".join([self._events.delta(fields, None, {}) for fields in self._parsed.finish(text)])
            text = ""
            logprobs, untold = self._tell(self._shown)
        ending = self._settle()
        ending.more.update(untold)
        more = self.timeline_fields() if self._ask.wants_timeline else {}
        return before + self._events.finish(text, logprobs, ending, more)

    def usage_event(self, usage: Usage) -> bytes:
        return self._events.usage(usage)

    # As a whole

    async def render(self, index: int) -> bytes:
        """This choice of a whole answer."""
        said = self._said()
        logprobs = await self._manner.all_logprobs([*await self._echoed_tokens(), *self._shown])
        of_prompt = await self.of_prompt() if self._ask.chat is None else {}
        ending = self._settle()
        ending.more.update(of_prompt)
        if self._ask.shows_token_ids:
            ending.more["token_ids"] = [one.token.id for one in self._shown]
        return self._manner.dialect.choice(index, said, logprobs, ending)

    async def of_prompt(self) -> Fields:
        """What was asked to be told of the prompt."""
        more: Fields = {}
        if (tops := self._ask.prompt_logprobs) is not None:
            more["prompt_logprobs"] = [None, *await self._all_scored(tops)]
        if self._ask.shows_token_ids:
            more["prompt_token_ids"] = list(unpack(self.request.prompt))
        return more

    def timeline_fields(self) -> Fields:
        return {"penstock": {"timeline": openai.timeline_fields(self._timeline())}}

    # What comes in

    def begin(self, prompt_logprobs: Sequence[Token] | None) -> None:
        """The first token is there, and what was told with it."""
        self.prompt_logprobs = prompt_logprobs or (self.leader.prompt_logprobs if self.leader else ())
        self.has_begun.set()

    def collect(self, tokens: Sequence[Token], finish: Finish | None, at_s: float) -> None:
        """Keeps what these tokens add, until `render`."""
        texts = self._take(tokens, finish, at_s)
        if self._parsed is None:
            self._texts += texts
            return
        for text in texts:
            self._parsed.keep(text)
        self.is_complete = self.is_complete or self._parsed.is_complete

    def _take(self, tokens: Sequence[Token], finish: Finish | None, at_s: float) -> list[str]:
        """What each of these tokens adds to the text, up to a stop string. A token that ended the answer is no text."""
        self._note_times(len(tokens), at_s)
        if finish is not None:
            self._finish = finish
            self.is_complete = True
            if finish.reason == "abort":
                raise EngineFailed("the worker gave the request up")
        if self._ask.max_tokens == 0:  # one had to be generated; the prompt alone was asked for
            self.is_complete = True
            return []
        if finish is not None and finish.stop_token is not None:
            self.tokens += 1
            tokens = tokens[:-1]
        texts = []
        for token in tokens:
            texts.append(self._output.push(token.id))
            if self._output.stopped_by:
                self.is_complete = True
                break
        self.tokens += len(texts)
        if not self._is_plain or self._ask.best_of > self._ask.n:
            self._note(tokens[: len(texts)], texts)
        return texts

    def pass_over(self) -> None:
        """The choice is complete; nothing changes unless others were better and it was not rendered."""
        if self.record.state == "running":
            self._settle()

    def fail(self, error: PenstockError) -> None:
        if self.record.state == "running":
            self.record.state = "failed"
            self.record.error = f"{type(error).__name__}: {error}"
            self.record.timeline = self._timeline()

    def cancel(self, why: BaseException) -> None:
        if self.record.state != "running":
            return
        metrics.count(self._manner.series.finished, "abort")
        self.record.state = "cancelled"
        self.record.error = str(why)
        self.record.timeline = self._timeline()

    def _said(self) -> bytes:
        rest = self._output.finish()
        if self._parsed is not None:
            return openai.chat_message(self._parsed.message(rest))
        return self._manner.dialect.said(self._echoed + "".join(self._texts) + rest)

    def _parsed_events(self, parsed: Parsed, texts: Sequence[str]) -> bytes:
        """As many events as there is something to show; what is told of tokens comes with the first after them."""
        events = []
        for later, text in zip(reversed(range(len(texts))), texts, strict=True):
            for fields in parsed.push(text):
                until = max(0, len(self._shown) - later)
                untold, self._shown = self._shown[:until], self._shown[until:]
                events.append(self._events.delta(fields, *self._tell(untold)))
        self.is_complete = self.is_complete or parsed.is_complete
        return b"".join(events)

    def _tell(self, shown: Sequence[Shown]) -> tuple[Fields | None, Fields]:
        """Log probabilities and ids of tokens, as an event of a parsed answer has them."""
        if not shown:
            return None, {}
        ids: Fields = {"token_ids": [one.token.id for one in shown]} if self._ask.shows_token_ids else {}
        return self._manner.logprobs(shown), ids

    def _event_of(self, text: str, shown: Shown) -> bytes:
        more: Fields = {"token_ids": [shown.token.id]} if self._ask.shows_token_ids else {}
        return self._events.token_with(text, self._manner.logprobs([shown]), more)

    def _note_times(self, tokens: int, at_s: float) -> None:
        if not tokens:
            return
        series = self._manner.series
        if self._last_s is None:
            series.ttft_s.observe(at_s - self._manner.arrived_s)
            series.prompt_tokens += self.request.prompt_tokens
        else:
            series.itl_s.observe((at_s - self._last_s) / tokens, tokens)
        self._last_s = at_s
        series.generation_tokens += tokens

    def _note(self, tokens: Sequence[Token], texts: Sequence[str]) -> None:
        for token, text in zip(tokens, texts, strict=True):
            self._shown.append(Shown(token, self._chars))
            self._logprob += token.logprob or 0.0
            self._chars += len(text)

    async def _echoed_tokens(self) -> list[Shown]:
        """The prompt's tokens with their log probabilities, where they are shown; the first one has none."""
        if not self._echoed or self._ask.logprobs is None:
            return []
        ids, at, shown = unpack(self.request.prompt), 0, []
        for number, scored in enumerate((Token(ids[0]), *self.prompt_logprobs), 1):
            if number % AT_A_TIME == 0:
                await asyncio.sleep(0)
            token = msgspec.structs.replace(scored, top=scored.top[: self._ask.logprobs])
            shown.append(Shown(token, min(at, len(self._echoed))))
            at += len(self._manner.tokenizer.spell(token.id).decode(errors="replace"))
        return shown

    async def _all_scored(self, tops: int) -> list[msgspec.Raw]:
        scored = []
        for number, token in enumerate(self.prompt_logprobs, 1):
            if number % AT_A_TIME == 0:
                await asyncio.sleep(0)
            scored.append(msgspec.Raw(_encode(self._scored(token, tops))))
        return scored

    def _scored(self, token: Token, tops: int) -> Fields:
        """vLLM's form: by token id, the token itself first; ranks count from 1 and are null beyond those asked for."""
        ranked = {other: (logprob, rank) for rank, (other, logprob) in enumerate(token.top[:tops], 1)}
        own = {token.id: (token.logprob, ranked.get(token.id, (None, None))[1])}
        return {
            str(each): {
                "logprob": openai.finite(logprob),
                "rank": rank,
                "decoded_token": self._manner.tokenizer.spell(each).decode(errors="replace"),
            }
            for each, (logprob, rank) in (own | ranked).items()
        }

    def _settle(self) -> Ending:
        """The choice is complete: what is to be said and kept of it."""
        finish, timeline = self._finish, self._timeline()
        reason: str = "stop" if finish is None or self._output.stopped_by else finish.reason
        if self._ask.max_tokens == 0:
            reason = "length"
        if reason == "stop" and self._parsed is not None and self._parsed.has_calls:
            reason = "tool_calls"
        self.record.state = "finished"
        self.record.finish_reason = reason
        self.record.timeline = timeline
        series = self._manner.series
        series.e2e_s.observe(now() - self._manner.arrived_s)
        series.stream_moves += timeline.moves
        metrics.count(series.finished, reason)
        started_s, ended_s = timeline.prefill_started_s, timeline.prefill_ended_s
        if started_s is not None and ended_s is not None:
            series.queue_s.observe(started_s)
            series.prefill_s.observe(ended_s - started_s)
        return Ending(reason, self._stop_reason(), {})

    def _stop_reason(self) -> str | int | None:
        """The stop string, or the token of `stop_token_ids`; the end of a text is no reason that was asked for."""
        if self._output.stopped_by:
            return self._output.stopped_by
        stop = None if self._finish is None or self._ask.max_tokens == 0 else self._finish.stop_token
        return stop if stop in self.request.sampling.stop_token_ids else None

    def _timeline(self) -> Timeline:
        """The workers', completed by what is known here if they were stopped before they could tell the end."""
        if self._finish is not None:
            return self._finish.timeline
        told = self.record.timeline or Timeline(prompt_tokens=self.request.prompt_tokens)
        return msgspec.structs.replace(told, output_tokens=self.tokens, ended_s=now() - self._manner.arrived_s)
