"""Real models through the whole path, served now here, now there: the tokens are those of generate() in float32.

`test_architectures.py` asks this of every architecture; here are the paths that a few kinds are enough for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

torch = pytest.importorskip("torch")

from penstock.engine.embedded import EmbeddedEngine, Options  # noqa: E402
from penstock.errors import WorkerDraining  # noqa: E402
from penstock.policy.batching import Limits  # noqa: E402
from penstock.request import Finish, Request, Sampling, Token  # noqa: E402
from penstock.serve.prefill import PrefillOptions  # noqa: E402
from penstock.serve.worker import WorkerOptions  # noqa: E402
from penstock.tokens import pack  # noqa: E402
from penstock.transport.tcp import TcpTransport  # noqa: E402
from tests.engine.embedded.driver import generated, prompts  # noqa: E402
from tests.models import VOCABULARY, make_model  # noqa: E402
from tests.serve.cluster import MODEL, Cluster, by_turns, cluster, through  # noqa: E402
from tests.support import run  # noqa: E402

SMALL_STEPS = WorkerOptions("", 0, limits=Limits(step_tokens=32), prefill=PrefillOptions(chunk_tokens=32))
ARCHITECTURES = ("llama", "mistral", "deepseek_v3")
TOKENS = 16
REMOTE, LOCAL = through("p", "d"), through("d", "d")
ROUTES = {"aggregated": LOCAL, "disaggregated": REMOTE, "mixed": by_turns(REMOTE, LOCAL)}


@pytest.fixture(scope="module", autouse=True)
def one_quiet_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp(request.param), request.param)


def engines(folder: Path) -> dict[str, tuple[str, EmbeddedEngine]]:
    options = Options(str(folder), threads=1)
    return {"p": ("prefill", EmbeddedEngine(options)), "d": ("decode", EmbeddedEngine(options))}


def greedy(tokens: int = TOKENS) -> Sampling:
    return Sampling(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=0)


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


async def stagger(site: Cluster, wanted: list[list[int]], sampling: Sampling) -> list[list[Token]]:
    """All prompts, each starting a moment after the one before: ragged batches and late joiners."""

    async def later(turns: int, prompt: list[int]) -> list[Token]:
        for _ in range(30 * turns):
            await asyncio.sleep(0)
        return (await site.ask(prompt, sampling))[0]

    return list(await asyncio.gather(*(later(turn, prompt) for turn, prompt in enumerate(wanted))))


def test_tokens_equal_generate(model: Path) -> None:
    wanted = prompts(7, 40, 61, 33, 90)
    shared = wanted[4][:48]
    wanted += [[*shared, 5, 6, 7], wanted[4]]  # prefix hits, a whole prompt among them

    async def story() -> list[list[Token]]:
        async with cluster(engines(model), ROUTES["mixed"], SMALL_STEPS, kv_blocks=80) as site:
            first = await stagger(site, wanted[:5], greedy())
            again = await stagger(site, wanted[5:], greedy())
            load = site.workers["d"].load()
            assert load.cached_tokens >= 48
            assert load.handoffs > 0
            assert load.copied_bytes == 0
            site.check_all_free()
            return first + again

    outputs = run(story(), timeout_s=120)
    assert [ids(output) for output in outputs] == [generated(model, prompt, TOKENS) for prompt in wanted]


def test_tokens_equal_generate_where_kv_crosses_a_network(model: Path) -> None:
    wanted = prompts(7, 40, 61, 33, 90)
    wanted += [[*wanted[4][:48], 5, 6, 7]]

    async def story() -> list[list[Token]]:
        async with TcpTransport("token") as there, TcpTransport("token") as here:
            ways = {"p": there, "d": here}
            async with cluster(engines(model), ROUTES["mixed"], SMALL_STEPS, 80, ways) as site:
                outputs = await stagger(site, wanted, greedy())
                assert site.workers["d"].load().copied_bytes > 0
                site.check_all_free()
                return outputs

    outputs = run(story(), timeout_s=120)
    assert [ids(output) for output in outputs] == [generated(model, prompt, TOKENS) for prompt in wanted]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("after", [1, 7, 15])
def test_a_stream_that_moves_is_the_undisturbed_one(model: Path, after: int, temperature: float) -> None:
    (prompt,) = prompts(50)
    sampling = Sampling(max_tokens=TOKENS, temperature=temperature, seed=11, ignore_eos=True, logprobs=2)

    async def story(after: int | None) -> tuple[list[Token], Finish]:
        route = by_turns(REMOTE, through("p", "p"))
        async with cluster(engines(model), route, SMALL_STEPS, kv_blocks=80) as site:
            tokens: list[Token] = []
            async with site.router.generate(Request("r", MODEL, pack(prompt), sampling)) as stream:
                while True:
                    fresh, finish = await stream.read()
                    if after is not None and len(tokens) < after <= len(tokens) + len(fresh):
                        stream.move(WorkerDraining("going elsewhere"))
                    tokens += fresh
                    if finish is not None:
                        return tokens, finish

    (intact, _), (moved, finish) = run(story(None), 60), run(story(after), 60)
    assert ids(moved) == ids(intact)
    assert [token.logprob for token in moved] == pytest.approx([token.logprob for token in intact], abs=1e-4)
    assert finish.timeline.output_tokens == TOKENS and finish.timeline.prompt_tokens == len(prompt)
    assert (finish.timeline.moves, finish.timeline.decode_worker) == (1, "p")


def test_a_pool_too_small_for_everybody_changes_nothing(model: Path) -> None:
    wanted = prompts(30, 45, 50, 20, 60)

    async def story() -> list[list[Token]]:
        both = engines(model)
        layout = both["d"][1].info.layout
        blocks = 5 + layout.blocks_for(100, SMALL_STEPS.limits.step_tokens)
        async with cluster(both, ROUTES["mixed"], SMALL_STEPS, blocks) as site:
            outputs = await stagger(site, wanted, greedy(40))
            if "all" in layout.keeps:  # a window alone does not grow while it decodes
                assert site.workers["d"].load().preemptions > 0
            site.check_all_free()
            return outputs

    outputs = run(story(), timeout_s=120)
    assert [ids(output) for output in outputs] == [generated(model, prompt, 40) for prompt in wanted]


def test_sampling_is_the_same_whoever_serves_it(model: Path) -> None:
    (prompt,) = prompts(50)
    sampling = Sampling(max_tokens=20, temperature=1.0, top_p=0.95, top_k=40, seed=11, ignore_eos=True)

    async def story(route: str) -> list[int]:
        async with cluster(engines(model), ROUTES[route], SMALL_STEPS, kv_blocks=80) as site:
            neighbours = asyncio.gather(*(site.ask(p, greedy(30)) for p in prompts(20, 35)))
            tokens, _ = await site.ask(prompt, sampling)
            await neighbours
            return ids(tokens)

    alone, together = run(story("aggregated"), 60), run(story("disaggregated"), 60)
    assert alone == together
    assert len(set(alone)) > 5


def test_logprobs_show_what_text_may_hide(model: Path) -> None:
    """Undamaged runs differ by rounding at most; zeroes where the prompt's KV was show."""
    (prompt,) = prompts(64)

    async def story(damage: bool) -> list[Token]:
        async with cluster(engines(model), REMOTE, SMALL_STEPS, kv_blocks=40) as site:
            damager = asyncio.create_task(spoil(site)) if damage else None
            tokens, finish = await site.ask(prompt, greedy())
            assert finish.timeline.path == "in-place"
            if damager is not None:
                await damager
            return tokens

    async def spoil(site: Cluster) -> None:
        """Zeroes the whole region as soon as the hand-over has happened."""
        while site.workers["d"].load().handoffs == 0:
            await asyncio.sleep(0.001)
        buffer = site.regions["d"].buffer
        assert buffer is not None
        buffer[:] = bytes(len(buffer))

    intact, again, damaged = run(story(False), 60), run(story(False), 60), run(story(True), 60)
    assert [token.logprob for token in intact] == [token.logprob for token in again]
    pairs = zip(intact, damaged, strict=True)
    assert max(abs((a.logprob or 0) - (b.logprob or 0)) for a, b in pairs) > 1e-4


def test_clients_that_leave_in_any_phase_leave_no_block_behind(model: Path) -> None:
    rng = Random(5)

    async def story() -> None:
        async with cluster(engines(model), ROUTES["mixed"], SMALL_STEPS, kv_blocks=60) as site:
            asking = [
                asyncio.create_task(site.ask([rng.randrange(4, VOCABULARY) for _ in range(60)], greedy(40)))
                for _ in range(12)
            ]
            for task in asking:
                await asyncio.sleep(0.005)
                task.cancel()
            await asyncio.wait(asking)
            async with asyncio.timeout(10):
                while any(w.load().free_blocks < w.load().blocks for w in site.workers.values()):
                    await asyncio.sleep(0.01)
            site.check_all_free()

    run(story(), timeout_s=60)
