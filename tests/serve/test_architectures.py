"""Every architecture through whole clusters: greedy tokens in float32 are those of generate(), whoever served them.

One story serves all: ragged prompts that join one after the other, a client that leaves, and a pool in which not all
have room. In another, prompts have cached beginnings. Mutants at the end drop one thing each; the first story shows it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest

torch = pytest.importorskip("torch")

from penstock.cluster import Role  # noqa: E402
from penstock.engine import embedded_attention  # noqa: E402
from penstock.engine.api import Step  # noqa: E402
from penstock.engine.embedded import EmbeddedEngine, Options  # noqa: E402
from penstock.engine.embedded_attention import Scoring  # noqa: E402
from penstock.engine.embedded_batch import Group, Span  # noqa: E402
from penstock.policy.batching import Limits  # noqa: E402
from penstock.policy.routing.api import Route  # noqa: E402
from penstock.request import Request, Sampling, Token  # noqa: E402
from penstock.serve.prefill import PrefillOptions  # noqa: E402
from penstock.serve.worker import WorkerOptions  # noqa: E402
from penstock.tokens import pack  # noqa: E402
from penstock.transport.api import Transport  # noqa: E402
from penstock.transport.tcp import TcpTransport  # noqa: E402
from tests.engine.embedded.driver import all_generated, prompts  # noqa: E402
from tests.models import SERVED, WINDOWED, make_model  # noqa: E402
from tests.serve.cluster import MODEL, Cluster, by_turns, cluster, through  # noqa: E402
from tests.support import run  # noqa: E402

SMALL_STEPS = WorkerOptions("", 0, limits=Limits(step_tokens=32), prefill=PrefillOptions(chunk_tokens=32))
TOKENS = 40
GREEDY = Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True)
JOINING = prompts(7, 40, 61, 33, 90)
LONGEST = JOINING[-1]
LIKE_THE_LONGEST = [*LONGEST[:48], 5, 6, 7]
ROUTES = {"aggregated": through("d", "d"), "disaggregated": through("p", "d")}

Ids = list[list[int]]


class Known(NamedTuple):
    """A tiny model, and what generate() says."""

    folder: Path
    to_joining: Ids
    to_like_the_longest: list[int]


@pytest.fixture(scope="module", autouse=True)
def one_quiet_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Known]:
    """By architecture, made once."""

    @cache
    def of(architecture: str) -> Known:
        folder = make_model(tmp_path_factory.mktemp(architecture), architecture)
        *joining, alike = all_generated(folder, [*JOINING, LIKE_THE_LONGEST], TOKENS)
        return Known(folder, joining, alike)

    return of


def engines(folder: Path, kind: type[EmbeddedEngine] = EmbeddedEngine) -> dict[str, tuple[Role, EmbeddedEngine]]:
    options = Options(str(folder), threads=1)
    return {"p": ("prefill", kind(options)), "d": ("decode", kind(options))}


async def play(
    folder: Path,
    route: Route,
    transports: dict[str, Transport] | None = None,
    engine: type[EmbeddedEngine] = EmbeddedEngine,
    mutant: AbstractContextManager[object] = nullcontext(),
) -> Ids:
    """The outputs for `JOINING`. A `mutant` comes in once the models were loaded and tried out."""
    both = engines(folder, engine)
    layout = both["d"][1].info.layout
    # Who joins has room for the prompt, not for the output as well.
    few_blocks = 1 + layout.blocks_for(len(LONGEST) + TOKENS, SMALL_STEPS.limits.step_tokens)
    async with cluster(both, route, SMALL_STEPS, few_blocks, transports) as site:
        with mutant:
            outputs = await tell(site)
        load = site.workers["d"].load()
        if "all" in layout.keeps:  # a window alone does not grow while it decodes
            assert load.preemptions > 0
        assert (load.handoffs > 0) == (route is not ROUTES["aggregated"])
        assert (load.copied_bytes > 0) == (transports is not None)
        site.check_all_free()
        return outputs


async def tell(site: Cluster) -> Ids:
    joined = [asyncio.create_task(join(site, turn, prompt)) for turn, prompt in enumerate(JOINING)]
    await leave(site, prompts(50)[0])
    return [await task for task in joined]


async def join(site: Cluster, turn: int, prompt: list[int]) -> list[int]:
    """Asks a moment after the one before."""
    for _ in range(30 * turn):
        await asyncio.sleep(0)
    return ids((await site.ask(prompt, GREEDY))[0])


async def leave(site: Cluster, prompt: list[int]) -> None:
    """A client that goes away after the first tokens."""
    async with site.router.generate(Request("leaving", MODEL, pack(prompt), GREEDY)) as stream:
        await stream.read()


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("architecture", SERVED)
def test_tokens_equal_generate(reference: Callable[[str], Known], architecture: str, route: str) -> None:
    folder, wanted, _ = reference(architecture)
    assert len({token for output in wanted for token in output}) > TOKENS, "a model that repeats itself proves nothing"
    assert run(play(folder, ROUTES[route]), timeout_s=60) == wanted


@pytest.mark.parametrize("architecture", SERVED)
def test_cached_prefixes_change_nothing(reference: Callable[[str], Known], architecture: str) -> None:
    folder, wanted, alike = reference(architecture)
    route = by_turns(ROUTES["disaggregated"], ROUTES["aggregated"])

    async def story() -> Ids:
        async with cluster(engines(folder), route, SMALL_STEPS, kv_blocks=80) as site:
            asked = (LONGEST, LONGEST, LIKE_THE_LONGEST, LIKE_THE_LONGEST)
            outputs = [ids((await site.ask(prompt, GREEDY))[0]) for prompt in asked]
            assert site.workers["d"].load().cached_tokens >= 80 + 48 + 48
            site.check_all_free()
            return outputs

    assert run(story(), timeout_s=60) == [wanted[-1], wanted[-1], alike, alike]


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3", "gemma3_text"])
def test_tokens_equal_generate_where_kv_crosses_a_network(reference: Callable[[str], Known], architecture: str) -> None:
    folder, wanted, _ = reference(architecture)

    async def story() -> Ids:
        async with TcpTransport("token") as there, TcpTransport("token") as here:
            return await play(folder, ROUTES["disaggregated"], {"p": there, "d": here})

    assert run(story(), timeout_s=60) == wanted


@pytest.mark.parametrize("architecture", WINDOWED)
def test_a_window_that_is_too_short_shows(reference: Callable[[str], Known], architecture: str) -> None:
    folder, wanted, _ = reference(architecture)
    real = Group.span

    def shorter(group: Group, window: int | None, table: int) -> Span:
        return real(group, None if window is None else window // 2, table)

    mutant = patch.object(Group, "span", shorter)
    assert run(play(folder, ROUTES["disaggregated"], mutant=mutant), timeout_s=60) != wanted


@pytest.mark.parametrize(
    ("architecture", "scoring"),
    [
        ("gemma2", lambda scaling, softcap, sinks: Scoring(scaling, None, sinks)),
        ("gpt_oss", lambda scaling, softcap, sinks: Scoring(scaling, softcap, None)),
    ],
    ids=["softcap", "sinks"],
)
def test_a_dropped_softcap_or_sink_shows(
    reference: Callable[[str], Known], architecture: str, scoring: Callable[..., Scoring]
) -> None:
    folder, wanted, _ = reference(architecture)
    mutant = patch.object(embedded_attention, "Scoring", scoring)
    assert run(play(folder, ROUTES["disaggregated"], mutant=mutant), timeout_s=60) != wanted


class Forgetful(EmbeddedEngine):
    """Loses the KV of one block of each group, that before a sequence's last one, when it decodes."""

    async def step(self, step: Step) -> list[Token | None]:
        buffer, size = step.region.buffer, step.region.layout.block_bytes
        assert buffer is not None
        width = len(step.region.layout.keeps)
        decoding = [s for s in step.slices if len(s.tokens) == 1 and s.start >= 16]
        for block in [block for s in decoding for block in s.blocks[(s.start // 16 - 1) * width :][:width]]:
            buffer[block * size : (block + 1) * size] = bytes(size)
        return await super().step(step)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "gpt2"])
def test_one_lost_block_shows(reference: Callable[[str], Known], architecture: str) -> None:
    folder, wanted, _ = reference(architecture)
    outputs = run(play(folder, ROUTES["disaggregated"], engine=Forgetful), timeout_s=60)
    assert all(output != right for output, right in zip(outputs, wanted, strict=True))
