"""Guides through whole clusters: the same tokens however a sequence travels, and failures that stay with their own."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from msgspec import structs  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from penstock.engine import simulated  # noqa: E402
from penstock.engine.api import EngineInfo  # noqa: E402
from penstock.engine.embedded import EmbeddedEngine, Options  # noqa: E402
from penstock.engine.simulated import SimulatedEngine  # noqa: E402
from penstock.errors import BadRequest, Unsupported, WorkerDraining  # noqa: E402
from penstock.policy.batching import Limits  # noqa: E402
from penstock.request import Finish, Guide, Request, Sampling, Token  # noqa: E402
from penstock.serve.prefill import PrefillOptions  # noqa: E402
from penstock.serve.worker import WorkerOptions  # noqa: E402
from penstock.tokens import pack  # noqa: E402
from tests.engine.embedded.driver import prompts  # noqa: E402
from tests.models import make_model  # noqa: E402
from tests.serve.cluster import MODEL, Cluster, by_turns, cluster, through  # noqa: E402
from tests.support import run  # noqa: E402

SMALL_STEPS = WorkerOptions("", 0, limits=Limits(step_tokens=32), prefill=PrefillOptions(chunk_tokens=32))
REMOTE, LOCAL, MOVED = through("p", "d"), through("d", "d"), through("p", "p")

LETTERS = Guide("regex", "([a-z]{3}-){8}[0-9]{2}")
PERSON = Guide(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 20}, "tags": {"enum": ["red", "green", "blue"]}},
            "required": ["name", "tags"],
            "additionalProperties": False,
        }
    ),
)
SAMPLED = Sampling(max_tokens=200, temperature=1.0, seed=11)
LATE = Guide("grammar", 'start: s "b"\ns: s s s | s s | "a"')  # too many readings of "aaaa" and so on


@pytest.fixture(scope="module", autouse=True)
def one_quiet_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def text(model: Path) -> Callable[[list[Token]], str]:
    """Of an output without its EOS."""
    codec = Tokenizer.from_file(str(model / "tokenizer.json"))
    return lambda tokens: str(codec.decode([token.id for token in tokens]))


def engines(folder: Path) -> dict[str, tuple[str, EmbeddedEngine]]:
    options = Options(str(folder), threads=1)
    return {"p": ("prefill", EmbeddedEngine(options)), "d": ("decode", EmbeddedEngine(options))}


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


def is_person(text: str) -> bool:
    person = json.loads(text)
    return set(person) == {"name", "tags"} and person["tags"] in ("red", "green", "blue")


def guided(guide: Guide, **more: object) -> Sampling:
    return structs.replace(SAMPLED, guide=guide, **more)


def ask_alone(model: Path, wanted: list[list[int]], sampling: Sampling) -> list[list[Token]]:
    """One after the other, all on one worker."""

    async def story() -> list[list[Token]]:
        async with cluster({"d": engines(model)["d"]}, LOCAL, SMALL_STEPS, kv_blocks=80) as site:
            return [(await site.ask(prompt, sampling))[0] for prompt in wanted]

    return run(story(), 60)


@pytest.mark.parametrize("guide", [LETTERS, PERSON], ids=["regex", "json_schema"])
def test_prefilled_elsewhere_preempted_or_beside_others_it_is_the_same_output(
    model: Path, text: Callable[[list[Token]], str], guide: Guide
) -> None:
    wanted = prompts(30, 45, 50, 20)
    undisturbed = ask_alone(model, wanted, guided(guide))

    async def story() -> list[tuple[list[Token], Finish]]:
        async with cluster(engines(model), by_turns(REMOTE, LOCAL), SMALL_STEPS, kv_blocks=14) as site:
            free = asyncio.gather(*(site.ask(prompt, SAMPLED) for prompt in prompts(25, 35)))
            outputs = await asyncio.gather(*(site.ask(prompt, guided(guide)) for prompt in wanted))
            await free
            load = site.workers["d"].load()
            assert load.preemptions > 0 and load.handoffs > 0
            site.check_all_free()
            return list(outputs)

    outputs = run(story(), 60)
    assert [ids(tokens) for tokens, _ in outputs] == [ids(tokens) for tokens in undisturbed]
    assert all((finish.reason, finish.stop_token) == ("stop", tokens[-1].id) for tokens, finish in outputs)
    accepts = re.compile(LETTERS.text).fullmatch if guide is LETTERS else is_person
    assert all(accepts(text(tokens)) for tokens, _ in outputs)


@pytest.mark.parametrize("after", [1, 4, 15])
def test_a_guided_stream_that_moves_is_the_undisturbed_one(model: Path, after: int) -> None:
    (prompt,) = prompts(50)
    sampling = guided(PERSON, logprobs=0)
    (undisturbed,) = ask_alone(model, [prompt], sampling)

    async def story() -> tuple[list[Token], Finish]:
        async with cluster(engines(model), by_turns(REMOTE, MOVED), SMALL_STEPS, kv_blocks=80) as site:
            tokens: list[Token] = []
            async with site.router.generate(Request("r", MODEL, pack(prompt), sampling)) as stream:
                while True:
                    fresh, finish = await stream.read()
                    if len(tokens) < after <= len(tokens) + len(fresh):
                        stream.move(WorkerDraining("going elsewhere"))
                    tokens += fresh
                    if finish is not None:
                        return tokens, finish

    moved, finish = run(story(), 60)
    assert ids(moved) == ids(undisturbed) and len(moved) > after
    assert (finish.timeline.moves, finish.reason) == (1, "stop")


def test_choices_of_one_request_are_guided_each_by_itself(model: Path, text: Callable[[list[Token]], str]) -> None:
    (prompt,) = prompts(40)

    async def story() -> list[list[Token]]:
        async with cluster(engines(model), by_turns(REMOTE, LOCAL), SMALL_STEPS, kv_blocks=80) as site:
            outputs = await asyncio.gather(*(site.ask(prompt, guided(PERSON, choice=n)) for n in range(4)))
            return [tokens for tokens, _ in outputs]

    outputs = run(story(), 60)
    assert len({text(tokens) for tokens in outputs}) == 4
    assert all(is_person(text(tokens)) for tokens in outputs)
    (third,) = ask_alone(model, [prompt], guided(PERSON, choice=2))
    assert ids(outputs[2]) == ids(third)


@pytest.mark.parametrize("route", [LOCAL, REMOTE], ids=["aggregated", "disaggregated"])
@pytest.mark.parametrize("guide", [Guide("regex", "("), LATE], ids=["from the start", "in mid-stream"])
def test_a_guide_that_cannot_be_followed_fails_its_own_request_alone(
    model: Path, route: Callable[..., object], guide: Guide
) -> None:
    prompt, other = prompts(50, 40)
    only_a = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id("a")
    sampling = guided(guide, logit_bias=((only_a, 100.0),))
    (undisturbed,) = ask_alone(model, [other], guided(LETTERS))

    async def story(site: Cluster) -> list[Token]:
        good = asyncio.ensure_future(site.ask(other, guided(LETTERS)))
        with pytest.raises(BadRequest, match="cannot be followed"):
            await site.ask(prompt, sampling)
        tokens, _ = await good
        again, _ = await site.ask(other, guided(LETTERS))
        assert ids(again) == ids(tokens)
        site.check_all_free()
        return tokens

    async def on_a_cluster() -> list[Token]:
        async with cluster(engines(model), route, SMALL_STEPS, kv_blocks=80) as site:  # type: ignore[arg-type]
            return await story(site)

    assert ids(run(on_a_cluster(), 60)) == ids(undisturbed)


def test_a_worker_whose_engine_cannot_guide_says_so() -> None:
    async def story() -> None:
        engine = SimulatedEngine(simulated.Options(vocab_size=1000))
        async with cluster({"d": ("decode", engine)}, LOCAL, SMALL_STEPS, kv_blocks=80) as site:
            with pytest.raises(Unsupported, match="has no guide"):
                await site.ask([1, 2, 3], guided(LETTERS))

    run(story(), 60)


class Unable(EmbeddedEngine):
    """Follows no guide."""

    @property
    def info(self) -> EngineInfo:
        return replace(super().info, supports=("logprobs", "sampling"))


@pytest.mark.parametrize("after", [0, 3])
def test_a_worker_that_cannot_guide_or_has_too_little_room_is_passed_over(model: Path, after: int) -> None:
    """Neither ends the stream: a third one takes it, whether or not it has begun."""
    (prompt,) = prompts(50)
    (undisturbed,) = ask_alone(model, [prompt], guided(LETTERS))
    small = EmbeddedEngine(Options(str(model), threads=1, max_context_tokens=40))
    unable = Unable(Options(str(model), threads=1))
    all_engines = {**engines(model), "small": ("any", small), "unable": ("any", unable)}
    inept = [through("unable", "unable"), through("small", "small")]
    turns = by_turns(*inept, LOCAL) if not after else by_turns(LOCAL, *inept, MOVED)

    async def story() -> tuple[list[Token], Finish]:
        async with cluster(all_engines, turns, SMALL_STEPS, kv_blocks=80) as site:  # type: ignore[arg-type]
            tokens: list[Token] = []
            async with site.router.generate(Request("r", MODEL, pack(prompt), guided(LETTERS))) as stream:
                while True:
                    fresh, finish = await stream.read()
                    if len(tokens) < after <= len(tokens) + len(fresh):
                        stream.move(WorkerDraining("going elsewhere"))
                    tokens += fresh
                    if finish is not None:
                        site.check_all_free()
                        return tokens, finish

    tokens, finish = run(story(), 60)
    assert ids(tokens) == ids(undisturbed)
    assert len(finish.timeline.failures) == 2 + bool(after)


def test_a_prefill_worker_that_cannot_guide_computes_nothing_for_a_guide(model: Path) -> None:
    (prompt,) = prompts(50)
    (undisturbed,) = ask_alone(model, [prompt], guided(LETTERS))
    both = {**engines(model), "p": ("prefill", Unable(Options(str(model), threads=1)))}

    async def story() -> list[Token]:
        async with cluster(both, REMOTE, SMALL_STEPS, kv_blocks=80) as site:  # type: ignore[arg-type]
            tokens, finish = await site.ask(prompt, guided(LETTERS))
            assert site.workers["p"].load().steps == 0
            assert (finish.timeline.path, len(finish.timeline.failures)) == ("local", 1)
            return tokens

    assert ids(run(story(), 60)) == ids(undisturbed)
