"""The generator against a scripted server: what is sent, when, how many at a time, and what becomes of failures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from penstock.errors import SetupError
from penstock.load.generator import Asking, Generator
from penstock.load.http import Http
from penstock.load.prompts import Prefix, Prompts
from penstock.load.record import Recorder
from penstock.load.report import summarize
from penstock.load.server import count_tokens, find_model
from penstock.workloads.workload import Session, Turn, Workload
from tests.load.made import SLO, cell
from tests.load.scripted import HEAD, Scripted, Step, chunk, closing, event, scripted, streamed, token, whole
from tests.support import run

ASKING = Asking("tiny", "completions", Prompts("completions", None, Prefix(), ""), timeout_s=20.0)
ANSWER = streamed(token(), token(), closing(9, 2, 4))
Script = Callable[[str, Mapping[str, object]], Sequence[Step]]


def sessions(number: int, apart_s: float = 0.0, turns: int = 1, pause_s: float = 0.0) -> Workload:
    def made() -> list[Session]:
        some = tuple(Turn(9, range(place, place + 1), 2, pause_s if place else 0.0) for place in range(turns))
        return [Session(f"s{one}", one * apart_s, some) for one in range(number)]

    return Workload(lambda: iter(made()))


def opened(workload: Workload, script: Script, duration_s: float | None = None, asking: Asking = ASKING) -> Recorder:
    return played(script, lambda generator: generator.open(workload, duration_s), asking)[0]


def played(
    script: Script, play: Callable[[Generator], object], asking: Asking = ASKING
) -> tuple[Recorder, Scripted, int]:
    """What clients saw, the server, and how many requests were said to have ended."""
    ended = 0

    def on_end() -> None:
        nonlocal ended
        ended += 1

    async def main() -> tuple[Recorder, Scripted]:
        recorder = Recorder()
        async with scripted(script) as server, Http(server.url, {}) as http:
            await play(Generator(http, asking, recorder, on_end))  # type: ignore[misc]
        return recorder, server

    recorder, server = run(main())
    return recorder, server, ended


def test_a_request_asks_for_a_stream_with_usage() -> None:
    recorder, server, ended = played(lambda *_: ANSWER, lambda generator: generator.open(sessions(1), None))
    (body,) = server.bodies
    assert body.pop("prompt") and ended == 1
    assert body == {
        "model": "tiny",
        "max_tokens": 2,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    told = summarize(recorder, cell(), SLO)
    assert (told.ended, told.tokens.prompt, told.tokens.output, told.tokens.cached) == (1, 9, 2, 4)
    assert told.latencies.ttft is not None and told.latencies.itl is not None


def test_fields_may_be_added_and_left_out() -> None:
    asking = replace(ASKING, has_ignore_eos=False, more={"temperature": None, "top_k": 3})
    _, server, _ = played(lambda *_: ANSWER, lambda generator: generator.open(sessions(1), None), asking)
    assert "temperature" not in server.bodies[0] and "ignore_eos" not in server.bodies[0]
    assert server.bodies[0]["top_k"] == 3


def test_times_are_what_the_server_took() -> None:
    script = streamed(0.03, token(), 0.02, token(), 0.01, closing(9, 2))
    latencies = summarize(opened(sessions(3), lambda *_: script), cell(), SLO).latencies
    assert latencies.ttft is not None and latencies.end_to_end is not None
    assert latencies.ttft.p50 >= 0.029
    assert latencies.end_to_end.p50 >= 0.058


def test_an_open_loop_does_not_wait_for_answers() -> None:
    """Nobody is answered before all have asked."""
    all_asked, asked = asyncio.Event(), 0

    def script(path: str, body: Mapping[str, object]) -> Sequence[Step]:
        nonlocal asked
        asked += 1
        if asked == 5:
            all_asked.set()
        return [all_asked, *ANSWER]

    requests = opened(sessions(5, apart_s=0.01), script).requests()
    assert (requests.sent_s >= requests.due_s - 0.002).all()  # timers are rounded to milliseconds
    assert np.diff(requests.due_s) == pytest.approx(0.01)
    assert requests.ended_s.min() >= requests.sent_s.max()


def test_a_closed_loop_has_so_many_under_way() -> None:
    recorder, server, ended = played(
        lambda *_: streamed(token(), 0.005, closing(9, 1)), lambda generator: generator.closed(sessions(12), 3, None)
    )
    assert (ended, len(server.bodies), server.most_under_way, server.connections) == (12, 12, 3, 3)
    assert np.isnan(recorder.requests().due_s).all()


def test_nothing_is_sent_after_the_duration_but_answers_are_waited_for() -> None:
    def script(path: str, body: Mapping[str, object]) -> Sequence[Step]:
        return streamed(token(), 0.45, closing(9, 1))

    recorder = opened(sessions(1000, apart_s=0.01), script, 0.4)
    assert 0 < len(recorder.requests().error) <= 40
    assert not np.isnan(recorder.requests().ended_s).any()
    recorder, _, ended = played(script, lambda generator: generator.closed(sessions(1000), 2, 0.4))
    assert ended == 2 and summarize(recorder, cell(), SLO).ended == 2


def test_a_session_goes_on_after_its_pause() -> None:
    recorder = opened(sessions(1, turns=3, pause_s=0.02), lambda *_: ANSWER)
    requests = recorder.requests()
    assert len(requests.error) == 3
    assert (requests.due_s[1:] - requests.ended_s[:-1]).min() >= 0.019
    assert (requests.sent_s[1:] >= requests.due_s[1:] - 0.002).all()


def test_a_session_ends_with_its_first_failure() -> None:
    recorder = opened(sessions(2, turns=3), lambda *_: [whole(503, {"error": {"type": "overloaded"}})])
    assert summarize(recorder, cell(), SLO).errors == {"HTTP 503: overloaded": 2}


@pytest.mark.parametrize(
    ("steps", "error"),
    [
        ([HEAD, chunk(token()), None], "connection lost"),
        (streamed(token()), "stream ended without [DONE]"),
        (streamed(token(), event({"error": {"type": "server_error"}})), "error in mid-stream: server_error"),
    ],
)
def test_failures_are_counted_by_kind(steps: Sequence[Step], error: str) -> None:
    told = summarize(opened(sessions(2), lambda *_: steps), cell(), SLO)
    assert (told.errors, told.ended, told.unfinished) == ({error: 2}, 0, 0)


def test_an_answer_that_takes_too_long_is_given_up() -> None:
    asking = replace(ASKING, timeout_s=0.1)
    told = summarize(opened(sessions(2), lambda *_: streamed(token(), 60.0), asking=asking), cell(), SLO)
    assert (told.errors, told.unfinished) == ({"timeout": 2}, 0)


def test_cancelling_leaves_what_is_under_way_open() -> None:
    async def main() -> Recorder:
        recorder = Recorder()
        async with scripted(lambda *_: streamed(token(), 60.0)) as server, Http(server.url, {}) as http:
            task = asyncio.ensure_future(Generator(http, ASKING, recorder, lambda: None).closed(sessions(9), 2, None))
            while recorder.requests().events.sum() < 2:
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.wait([task])
        return recorder

    told = summarize(run(main()), cell(), SLO)
    assert (told.requests, told.unfinished, told.errors) == (2, 2, {})


# What a server tells of itself


async def found(status: int, body: object, model: str = "") -> str:
    async with scripted(lambda *_: [whole(status, body)]) as server, Http(server.url, {}) as http:
        return await find_model(http, model)


def test_the_only_model_is_taken() -> None:
    assert run(found(200, {"data": [{"id": "tiny"}]})) == "tiny"
    assert run(found(200, {"data": [{"id": "tiny"}]}, "other")) == "other"
    assert run(found(404, {}, "other")) == "other"


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (200, {"data": [{"id": "a"}, {"id": "b"}]}, "the server has a, b: name one with --model"),
        (200, {"data": []}, "the server has no model"),
        (200, {"models": []}, "is no list of models"),
        (404, {}, "HTTP 404: name the --model"),
        (401, {"error": {"message": "who are you?"}}, r"\(who are you\?\): set PENSTOCK_API_KEY"),
    ],
)
def test_a_model_that_is_not_clear(status: int, body: object, why: str) -> None:
    with pytest.raises(SetupError, match=why):
        run(found(status, body))


async def counted(steps: Sequence[Step]) -> int:
    async with scripted(lambda *_: steps) as server, Http(server.url, {}) as http:
        return await count_tokens(http, ASKING)("some text")


def test_tokens_are_counted_by_the_server() -> None:
    assert run(counted(streamed(token(), closing(42, 1)))) == 42


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([whole(400, {"error": {"message": "no such field"}})], r"with HTTP 400 \(no such field\): --endpoint, "),
        (streamed(token(), b"data: [DONE]\n\n"), "its streams have no usage"),
        ([whole(200, {"choices": []})], r"no stream of OpenAI's \(stream ended without \[DONE\]\)"),
        ([None], "no server answers at http"),
    ],
)
def test_a_server_that_cannot_be_measured(steps: Sequence[Step], why: str) -> None:
    with pytest.raises(SetupError, match=why):
        run(counted(steps))
