"""Penalties, bans and log probabilities of prompts through the whole path, whoever serves a sequence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from msgspec import structs  # noqa: E402

from penstock.engine.simulated import Options as SimulatedOptions  # noqa: E402
from penstock.engine.simulated import SimulatedEngine  # noqa: E402
from penstock.errors import BadRequest, Unsupported, WorkerDraining  # noqa: E402
from penstock.policy.batching import Limits  # noqa: E402
from penstock.request import Finish, Request, Sampling, Token  # noqa: E402
from penstock.serve import decode  # noqa: E402
from penstock.tokens import pack  # noqa: E402
from penstock.transport.api import Transport  # noqa: E402
from penstock.transport.tcp import TcpTransport  # noqa: E402
from tests.engine.embedded.driver import prompts  # noqa: E402
from tests.engine.embedded.test_scores import PENALIZED, assert_scores, full_forward  # noqa: E402
from tests.models import make_model  # noqa: E402
from tests.serve.cluster import MODEL, Cluster, by_turns, cluster, through  # noqa: E402
from tests.serve.test_real_model import LOCAL, REMOTE, ROUTES, SMALL_STEPS, engines, ids  # noqa: E402
from tests.support import run, wait_until  # noqa: E402

TOKENS = PENALIZED.max_tokens
TOP = 2
SCORED = structs.replace(PENALIZED, prompt_logprobs=TOP)
HARSH = structs.replace(PENALIZED, frequency_penalty=2.0, presence_penalty=2.0)  # but for prompts


@pytest.fixture(scope="module", autouse=True)
def one_quiet_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


@asynccontextmanager
async def site_of(
    folder: Path, route: str, kv_blocks: int = 80, ways: Mapping[str, Transport] | None = None
) -> AsyncIterator[Cluster]:
    async with cluster(engines(folder), ROUTES[route], SMALL_STEPS, kv_blocks, ways) as site:
        yield site
        site.check_all_free()


@dataclass
class Answer:
    """What a client was given."""

    tokens: list[Token]
    scores: list[Token] | None
    finish: Finish


async def ask(
    site: Cluster, prompt: list[int], sampling: Sampling, move_after: int | None = None, name: str = "r"
) -> Answer:
    """Reads to the end. After `move_after` tokens the stream moves to another worker."""
    tokens: list[Token] = []
    async with site.router.generate(Request(name, MODEL, pack(prompt), sampling)) as stream:
        while True:
            if move_after is not None and len(tokens) >= move_after:
                move_after = None
                stream.move(WorkerDraining("going elsewhere"))
            fresh, finish = await stream.read()
            tokens += fresh
            if finish is not None:
                return Answer(tokens, stream.prompt_logprobs, finish)


async def crowd(site: Cluster, wanted: list[list[int]], sampling: Sampling) -> list[list[int]]:
    answers = await asyncio.gather(*(site.ask(prompt, sampling) for prompt in wanted))
    return [ids(tokens) for tokens, _ in answers]


def alone(model: Path, wanted: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """Each prompt by itself, on one worker."""

    async def story() -> list[list[int]]:
        async with site_of(model, "aggregated") as site:
            return [ids((await site.ask(prompt, sampling))[0]) for prompt in wanted]

    return run(story(), 60)


@pytest.mark.parametrize("route", ["disaggregated", "mixed"])
def test_penalties_do_not_depend_on_who_serves(model: Path, route: str) -> None:
    wanted = prompts(50, 20, 35, 61)

    async def story() -> list[list[int]]:
        async with site_of(model, route) as site:
            return await crowd(site, wanted, PENALIZED)

    outputs = run(story(), 60)
    assert outputs == alone(model, wanted, PENALIZED)
    assert all(len(set(output)) > 10 for output in outputs)


def test_preempted_sequences_are_penalized_as_before(model: Path) -> None:
    wanted, sampling = prompts(30, 45, 50, 20, 60), structs.replace(PENALIZED, max_tokens=40, min_tokens=40)

    async def story() -> list[list[int]]:
        async with site_of(model, "mixed", kv_blocks=12) as site:
            outputs = await crowd(site, wanted, sampling)
            assert site.workers["d"].load().preemptions > 0
            return outputs

    assert run(story(), 60) == alone(model, wanted, sampling)


@pytest.mark.parametrize("after", [1, 7, 15])
def test_a_stream_that_moves_is_penalized_as_before(model: Path, after: int) -> None:
    """It is prefilled at one worker and decodes at the other, and then the other way round."""
    (prompt,) = prompts(50)

    async def story() -> Answer:
        async with cluster(engines(model), by_turns(REMOTE, through("d", "p")), SMALL_STEPS, 80) as site:
            answer = await ask(site, prompt, HARSH, after)
            assert site.workers["p"].load().handoffs == 1
            return answer

    answer = run(story(), 60)
    assert answer.finish.timeline.moves == 1
    assert [ids(answer.tokens)] == alone(model, [prompt], HARSH)


@pytest.mark.parametrize("route", ROUTES)
def test_a_prompt_is_scored_wherever_it_goes(model: Path, route: str) -> None:
    """Twice, the second time though its KV is cached, with others at the same time."""
    prompt, *others = prompts(70, 33, 50)

    async def story() -> list[Answer]:
        async with site_of(model, route) as site:
            neighbours = asyncio.gather(*(site.ask(other, PENALIZED) for other in others))
            answers = [await ask(site, prompt, SCORED) for _ in range(2)]
            await neighbours
            return answers

    expected, tokens = full_forward(model, prompt), alone(model, [prompt], PENALIZED)[0]
    for answer in run(story(), 60):
        assert answer.scores is not None
        assert_scores(answer.scores, prompt, expected, TOP)
        assert ids(answer.tokens) == tokens
        timeline = answer.finish.timeline
        assert (timeline.prefill_worker, timeline.cached_tokens, timeline.computed_tokens) == ("d", 0, len(prompt))


def test_a_prompt_is_scored_where_kv_crosses_a_network(model: Path) -> None:
    (prompt,) = prompts(70)

    async def story() -> Answer:
        async with (
            TcpTransport("token") as there,
            TcpTransport("token") as here,
            site_of(model, "disaggregated", ways={"p": there, "d": here}) as site,
        ):
            return await ask(site, prompt, SCORED)

    answer = run(story(), 60)
    assert answer.scores is not None
    assert_scores(answer.scores, prompt, full_forward(model, prompt), TOP)


@pytest.mark.parametrize("after", [0, 1, 9])
def test_a_scored_stream_that_moves_has_its_scores_once(model: Path, after: int) -> None:
    """Before the first token all is done again; later nothing of it is left to do."""
    (prompt,) = prompts(70)

    async def story() -> Answer:
        async with cluster(engines(model), by_turns(LOCAL, through("d", "p")), SMALL_STEPS, 80) as site:
            answer = await ask(site, prompt, SCORED, after)
            assert site.workers["p"].load().handoffs == (after > 0)
            return answer

    answer = run(story(), 60)
    assert answer.finish.timeline.decode_worker == "p"
    assert answer.scores is not None
    assert_scores(answer.scores, prompt, full_forward(model, prompt), TOP)
    assert [ids(answer.tokens)] == alone(model, [prompt], PENALIZED)


def test_a_prompt_that_is_preempted_in_mid_prefill_has_its_scores_once(model: Path) -> None:
    """Eight others take its blocks as they grow. It asks for one token, so it was preempted before that."""
    prompt, *others = prompts(300, *[5] * 8)
    growing = structs.replace(PENALIZED, max_tokens=60, min_tokens=60)

    async def story() -> Answer:
        few = replace(SMALL_STEPS, limits=Limits(step_tokens=16))
        async with cluster(engines(model), LOCAL, few, kv_blocks=38) as site:
            neighbours = asyncio.gather(*(site.ask(other, growing) for other in others))
            await wait_until(lambda: site.workers["d"].load().running >= len(others))
            answer = await ask(site, prompt, structs.replace(SCORED, max_tokens=1, min_tokens=0))
            await neighbours
            return answer

    answer = run(story(), 60)
    assert answer.finish.timeline.preemptions > 0
    assert answer.scores is not None
    assert_scores(answer.scores, prompt, full_forward(model, prompt), TOP)


def test_without_the_wish_nothing_is_scored(model: Path) -> None:
    (prompt,) = prompts(20)

    async def story() -> list[Answer]:
        async with site_of(model, "aggregated") as site:
            single = structs.replace(SCORED, max_tokens=1)
            return [await ask(site, prompt, PENALIZED), await ask(site, prompt[:1], single)]

    plain, single = run(story(), 60)
    assert plain.scores is None
    assert single.scores == []


def test_scores_that_no_frame_would_hold_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MOST_PROMPT_LOGPROBS", 100)
    (prompt,) = prompts(45)

    async def story() -> None:
        async with site_of(model, "aggregated") as site:
            await ask(site, prompt, structs.replace(SCORED, prompt_logprobs=1))
            with pytest.raises(BadRequest, match="prompt_logprobs of 45 tokens can be 1 at most"):
                await ask(site, prompt, SCORED)

    run(story(), 60)


def test_an_engine_that_cannot_score_is_not_asked_to() -> None:
    async def story() -> None:
        made_up = {"d": ("decode", SimulatedEngine(SimulatedOptions()))}
        async with cluster(made_up, LOCAL, SMALL_STEPS, 40) as site:
            with pytest.raises(Unsupported, match="has no prompt_logprobs"):
                await ask(site, [200, 201], SCORED)
            site.check_all_free()

    run(story(), 60)
