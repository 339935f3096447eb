"""Real models with windows, and prompts of many windows: tokens are those of generate(), and memory is what it should.

`tests/sim/test_windows.py` has the same on virtual time, where more can be looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from penstock.engine.embedded import EmbeddedEngine, Options  # noqa: E402
from penstock.policy.batching import Limits  # noqa: E402
from penstock.request import Sampling  # noqa: E402
from penstock.serve.prefill import PrefillOptions  # noqa: E402
from penstock.serve.worker import WorkerOptions  # noqa: E402
from penstock.transport.tcp import TcpTransport  # noqa: E402
from tests.engine.embedded.driver import all_generated, prompts  # noqa: E402
from tests.models import WINDOW, make_model  # noqa: E402
from tests.serve.cluster import Cluster, cluster, through  # noqa: E402
from tests.support import run  # noqa: E402

KEEPS = {"mistral": (WINDOW - 1,), "gemma3_text": ("all", WINDOW - 1), "gpt_oss": ("all", WINDOW - 1)}
STEP = 32
SMALL_STEPS = WorkerOptions("", 0, limits=Limits(step_tokens=STEP), prefill=PrefillOptions(chunk_tokens=STEP))
TOKENS = 24
GREEDY = Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True)
LONG, OTHER, SHORT = prompts(250, 150, 20)
WANTED = [LONG, OTHER, SHORT, [*LONG[:150], *SHORT], LONG[:170], LONG]  # with prefixes that end in the middle, and all
ROUTES = {"aggregated": through("d", "d"), "disaggregated": through("p", "d")}

Reference = Callable[[str], tuple[Path, list[list[int]]]]


@pytest.fixture(scope="module", autouse=True)
def one_quiet_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """An architecture's tiny model, and what generate() says to `WANTED`."""
    made: dict[str, tuple[Path, list[list[int]]]] = {}

    def of(architecture: str) -> tuple[Path, list[list[int]]]:
        if architecture not in made:
            folder = make_model(tmp_path_factory.mktemp(architecture), architecture)
            made[architecture] = folder, all_generated(folder, WANTED, TOKENS)
        return made[architecture]

    return of


def engines(folder: Path) -> dict[str, tuple[str, EmbeddedEngine]]:
    options = Options(str(folder), threads=1)
    return {"p": ("prefill", EmbeddedEngine(options)), "d": ("decode", EmbeddedEngine(options))}


async def ask_all(site: Cluster) -> list[list[int]]:
    """The first three at a time, then each of the others, of which the beginning is cached."""
    outputs = await asyncio.gather(*(site.ask(prompt, GREEDY) for prompt in WANTED[:3]))
    outputs += [await site.ask(prompt, GREEDY) for prompt in WANTED[3:]]
    site.check_all_free()
    return [[token.id for token in tokens] for tokens, _ in outputs]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("architecture", KEEPS)
def test_long_prompts_and_their_cached_prefixes_are_right(reference: Reference, architecture: str, route: str) -> None:
    folder, wanted = reference(architecture)

    async def story() -> list[list[int]]:
        async with cluster(engines(folder), ROUTES[route], SMALL_STEPS, kv_blocks=200) as site:
            assert site.workers["d"].member.layout.keeps == KEEPS[architecture]
            outputs = await ask_all(site)
            assert site.workers["d"].load().cached_tokens == 144 + 160 + 240
            return outputs

    assert run(story(), timeout_s=60) == wanted


@pytest.mark.parametrize("architecture", KEEPS)
def test_over_a_network_windows_are_right_and_little_of_them_is_sent(reference: Reference, architecture: str) -> None:
    folder, wanted = reference(architecture)

    async def story() -> list[list[int]]:
        async with TcpTransport("token") as there, TcpTransport("token") as here:
            ways = {"p": there, "d": here}
            async with cluster(engines(folder), ROUTES["disaggregated"], SMALL_STEPS, 200, ways) as site:
                _, finish = await site.ask(LONG, GREEDY)
                layout = site.workers["d"].member.layout
                ends = len(layout.kept(range(layout.entries_for(len(LONG))), len(LONG)))
                assert finish.timeline.copied_bytes == ends * layout.block_bytes
                assert ends == 16 * layout.keeps.count("all") + 2
                return await ask_all(site)

    assert run(story(), timeout_s=60) == wanted


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("architecture", KEEPS)
def test_a_pool_for_one_long_sequence_serves_all(reference: Reference, architecture: str, route: str) -> None:
    """Each waits for, is preempted by or overwrites the others; all of it in one table would not fit at all."""
    folder, wanted = reference(architecture)

    async def story() -> list[list[int]]:
        both = engines(folder)
        layout = both["d"][1].info.layout
        blocks = layout.blocks_for(len(LONG) + TOKENS, 2 * STEP) + len(layout.keeps)
        assert blocks < layout.entries_for(len(LONG) + TOKENS)
        async with cluster(both, ROUTES[route], SMALL_STEPS, blocks) as site:
            outputs = await ask_all(site)
            assert (site.workers["d"].load().handoffs > 0) == (route == "disaggregated")
            return outputs

    assert run(story(), timeout_s=60) == wanted
