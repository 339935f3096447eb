"""Every architecture through whole clusters: greedy tokens in float32 are those of generate(), whoever served them.

One story serves all: ragged prompts that join one after the other, a client that leaves, a pool in which not all have
room, and prompts whose beginnings are cached. The mutants at the end drop one thing each, and the story notices.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest

torch = pytest.importorskip("torch")

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
from tests.serve.cluster import MODEL, Cluster, cluster, through  # noqa: E402
from tests.support import run  # noqa: E402

SMALL_STEPS = WorkerOptions("", 0, limits=Limits(step_tokens=32), prefill=PrefillOptions(chunk_tokens=32))
TOKENS = 40
GREEDY = Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True)
JOINING = prompts(7, 40, 61, 33, 90)
LONGEST = JOINING[-1]
CACHED = [LONGEST, [*LONGEST[:48], 5, 6, 7]]
ROUTES = {"aggregated": through("d", "d"), "disaggregated": through("p", "d")}

Ids = list[list[int]]


@pytest.fixture(scope="module", autouse=True)
def one_quiet_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Ids]]:
    """An architecture's tiny model, and what generate() says to the prompts of the story."""
    made: dict[str, tuple[Path, Ids]] = {}

    def of(architecture: str) -> tuple[Path, Ids]:
        if architecture not in made:
            folder = make_model(tmp_path_factory.mktemp(architecture), architecture)
            made[architecture] = folder, all_generated(folder, JOINING + CACHED, TOKENS)
        return made[architecture]

    return of


async def play(
    folder: Path,
    route: Route,
    transports: dict[str, Transport] | None = None,
    engine: type[EmbeddedEngine] = EmbeddedEngine,
    mutant: AbstractContextManager[object] = nullcontext(),
) -> Ids:
    """The outputs for `JOINING`, then for `CACHED`. A `mutant` comes in once the models were loaded and tried out."""
    options = Options(str(folder), threads=1)
    engines = {"p": ("prefill", engine(options)), "d": ("decode", engine(options))}
    layout = engines["d"][1].info.layout
    # Who joins has room for the prompt, not for the output as well.
    blocks = 1 + layout.blocks_for(len(LONGEST) + TOKENS, SMALL_STEPS.limits.step_tokens)
    async with cluster(engines, route, SMALL_STEPS, blocks, transports) as site:
        with mutant:
            outputs = await tell(site)
        load = site.workers["d"].load()
        if "all" in layout.keeps:  # a window alone does not grow while it decodes
            assert load.preemptions > 0
        if not layout.has_windows:  # what they leave behind is the first to be overwritten in so small a pool
            assert load.cached_tokens >= 48
        assert (load.handoffs > 0) == (route is not ROUTES["aggregated"])
        assert (load.copied_bytes > 0) == (transports is not None)
        site.check_all_free()
        return outputs


async def tell(site: Cluster) -> Ids:
    joined = [asyncio.create_task(join(site, turn, prompt)) for turn, prompt in enumerate(JOINING)]
    await leave(site, prompts(50)[0])
    outputs = [await task for task in joined]
    return outputs + [ids((await site.ask(prompt, GREEDY))[0]) for prompt in CACHED]


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
def test_tokens_equal_generate(reference: Callable[[str], tuple[Path, Ids]], architecture: str, route: str) -> None:
    folder, wanted = reference(architecture)
    assert len({token for output in wanted for token in output}) > TOKENS, "a model that repeats itself proves nothing"
    assert run(play(folder, ROUTES[route]), timeout_s=60) == wanted


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3", "gemma3_text"])
def test_tokens_equal_generate_where_kv_crosses_a_network(
    reference: Callable[[str], tuple[Path, Ids]], architecture: str
) -> None:
    folder, wanted = reference(architecture)

    async def story() -> Ids:
        async with TcpTransport("token") as there, TcpTransport("token") as here:
            return await play(folder, ROUTES["disaggregated"], {"p": there, "d": here})

    assert run(story(), timeout_s=60) == wanted


@pytest.mark.parametrize("architecture", WINDOWED)
def test_a_window_that_is_too_short_shows(reference: Callable[[str], tuple[Path, Ids]], architecture: str) -> None:
    folder, wanted = reference(architecture)
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
    reference: Callable[[str], tuple[Path, Ids]], architecture: str, scoring: Callable[..., Scoring]
) -> None:
    folder, wanted = reference(architecture)
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
def test_one_lost_block_shows(reference: Callable[[str], tuple[Path, Ids]], architecture: str) -> None:
    folder, wanted = reference(architecture)
    outputs = run(play(folder, ROUTES["disaggregated"], engine=Forgetful), timeout_s=60)
    assert all(output != right for output, right in zip(outputs, wanted, strict=True))
