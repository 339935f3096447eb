"""The embedded engine against transformers and vLLM: ms per decode step, per prefill and per mixed step, in one run.

A Llama of 22 M parameters with random weights; contexts of 128 to 144 tokens. Rounds of all are interleaved and medians
reported: of wall time, and against transformers' generate() of process CPU time too. `--continuous-batching` adds that
of transformers, `--vllm` an interpreter that has vLLM's CPU build (`make test-vllm` makes one), whose processes stand
still while it is not their turn. Index building is the engine's own work before a forward pass.

`--where` times no reference, and says instead where a step's time goes, by torch's profiler.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from report import Row, emit
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import profile
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from penstock.blocks import BlockId, KvLayout, Region
from penstock.engine.api import Slice, Step
from penstock.engine.embedded import EmbeddedEngine, Options
from penstock.engine.embedded_batch import Geometry, build
from penstock.request import Sampling

PROMPT_TOKENS = 128
PREFILL_TOKENS = 512
STEPS = 16
MIXED_BATCH, MIXED_CHUNK = 8, 256
GREEDY = Sampling(max_tokens=STEPS, temperature=0)
GENERATE, CONTINUOUS, VLLM = "generate()", "continuous batching", "vLLM"
WHERE = {  # by the name of torch's operator
    "linear layers (in float32 also attention of chunks)": ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm"),
    "products of attention": ("aten::bmm", "aten::baddbmm"),
    "softmax": ("aten::_softmax",),
    "keys and values gathered": ("aten::index_select",),
    "keys and values written": ("aten::index_copy_",),
}
VLLM_AIMS = {"decode step, batch 32": 0.5}  # of its time; 1 where nothing is said
CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=10,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)


@dataclass(frozen=True, slots=True)
class Spent:
    """Milliseconds."""

    wall: float
    cpu: float

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.cpu - other.cpu)

    def __truediv__(self, parts: int) -> Spent:
        return Spent(self.wall / parts, self.cpu / parts)


class Stopwatch:
    """`with Stopwatch() as watch: ...; watch.spent`."""

    def __enter__(self) -> Stopwatch:
        self._from = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._from
        self.spent = Spent((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--threads", type=int, default=1, help="of a step, for all sides")
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"))
    parser.add_argument("--continuous-batching", action="store_true", help="that of transformers too: minutes")
    parser.add_argument("--vllm", metavar="PYTHON", default=os.environ.get("VLLM_PYTHON"), help="its interpreter")
    parser.add_argument("--where", action="store_true", help="where a step's time goes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder)
        emit(asyncio.run(where(folder, arguments) if arguments.where else measure(folder, arguments)), arguments.json)


async def measure(folder: str, arguments: argparse.Namespace) -> list[Row]:
    rows = []
    for dtype in arguments.dtypes:
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        engine = EmbeddedEngine(Options(folder, device="cpu", dtype=dtype, threads=arguments.threads))
        with vllm(arguments.vllm, folder, dtype, arguments.threads) as other:
            async with engine:
                bench = Bench(engine, reference)
                for case in cases(bench, arguments.continuous_batching, other):
                    rows += await race(case, dtype, 3 if arguments.quick else 11)
    return rows + index_building()


async def where(folder: str, arguments: argparse.Namespace) -> list[Row]:
    """Of each case the time of a step, and what of it is spent in which operators: the least of some rounds."""
    rows = []
    for dtype in arguments.dtypes:
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        engine = EmbeddedEngine(Options(folder, device="cpu", dtype=dtype, threads=arguments.threads))
        async with engine:
            bench = Bench(engine, reference)
            for batch in (1, 8, 32):
                started = await bench.start(batch)
                rows += await parts(f"decode step, batch {batch}, {dtype}", partial(bench.decode_on, *started), STEPS)
            rows += await parts(f"prefill of {PREFILL_TOKENS}, {dtype}", bench.prefill, 1)
    return rows


@dataclass(frozen=True, slots=True)
class Case:
    """What is timed, of the engine and of each reference that can do it."""

    name: str
    ours: Callable[[], Awaitable[Spent]]
    references: dict[str, Callable[[], Spent]]


def cases(bench: Bench, has_continuous: bool, other: Vllm | None) -> Iterator[Case]:
    for batch in (1, 8, 32):
        references = {GENERATE: partial(bench.decode_reference, batch)}
        if has_continuous:
            references[CONTINUOUS] = partial(bench.decode_continuous, batch)
        if other is not None:
            references[VLLM] = partial(other.measure, f"decode {batch}")
        yield Case(f"decode step, batch {batch}", partial(bench.decode, batch), references)
    references = {GENERATE: bench.prefill_reference}
    if other is not None:
        references[VLLM] = partial(other.measure, "prefill")
    yield Case(f"prefill of {PREFILL_TOKENS}", bench.prefill, references)
    mixed = {} if other is None else {VLLM: partial(other.measure, f"mixed {MIXED_BATCH} {MIXED_CHUNK}")}
    yield Case(f"batch {MIXED_BATCH} and a chunk of {MIXED_CHUNK}", bench.mixed, mixed)


async def race(case: Case, dtype: str, rounds: int) -> list[Row]:
    """All sides in turn, round by round."""
    ours: list[Spent] = []
    theirs: dict[str, list[Spent]] = {name: [] for name in case.references}
    for _ in range(rounds):
        ours.append(await case.ours())
        for name, reference in case.references.items():
            theirs[name].append(reference())
    title = f"{case.name}, {dtype}"
    rows = [
        Row(f"{title}, wall", median(ours, "wall"), "ms", name, median(theirs[name], "wall"), aim=aim(case.name, name))
        for name in case.references
    ] or [Row(f"{title}, wall", median(ours, "wall"), "ms")]
    if GENERATE in theirs:
        rows.append(Row(f"{title}, cpu", median(ours, "cpu"), "ms", GENERATE, median(theirs[GENERATE], "cpu")))
    return rows


async def parts(title: str, measure: Callable[[], Awaitable[Spent]], steps: int) -> list[Row]:
    """The least of some rounds, per step: of wall time, and of each kind of operator."""
    whole = min([(await measure()).wall for _ in range(9)])
    spent: dict[str, list[float]] = {}
    for _ in range(5):
        with profile(experimental_config=_ExperimentalConfig(profile_all_threads=True)) as profiler:
            await measure()
        for operator in profiler.key_averages():
            spent.setdefault(operator.key, []).append(operator.self_cpu_time_total / 1e3 / steps)
    named = {kind: sum(min(spent.pop(name, [0.0])) for name in names) for kind, names in WHERE.items()}
    named["other operators"] = sum(map(min, spent.values()))
    named["outside operators"] = whole - sum(named.values())
    return [Row(title, whole, "ms"), *(Row(f"  {kind}", own, "ms") for kind, own in named.items())]


def aim(case: str, reference: str) -> float | None:
    return VLLM_AIMS.get(case, 1.0) if reference == VLLM else None


def median(spent: Sequence[Spent], kind: str) -> float:
    return statistics.median(getattr(one, kind) for one in spent)


class Bench:
    """Both sides, on the same prompts."""

    def __init__(self, engine: EmbeddedEngine, reference: PreTrainedModel) -> None:
        layout = engine.info.layout
        blocks = 33 * layout.entries_for(PREFILL_TOKENS)
        self._engine = engine
        self._reference = reference
        self._region = Region("bench", 1, layout, blocks, memoryview(bytearray(blocks * layout.block_bytes)))
        self._prompts = torch.randint(CONFIG.vocab_size, (32, PROMPT_TOKENS))
        self._long = torch.randint(CONFIG.vocab_size, (1, PREFILL_TOKENS))
        engine.attach(self._region)

    async def decode(self, batch: int) -> Spent:
        return await self.decode_on(*await self.start(batch))

    async def start(self, batch: int) -> tuple[list[int], list[list[BlockId]]]:
        """First tokens and block tables of sequences whose prompts are computed in one step."""
        tables = self._tables(batch, PROMPT_TOKENS + STEPS)
        prompts = self._prompts[:batch].tolist()
        return await self._step([Slice(p, 0, table, GREEDY) for p, table in zip(prompts, tables, strict=True)]), tables

    async def decode_on(self, tokens: list[int], tables: list[list[BlockId]]) -> Spent:
        """The time per step."""
        with Stopwatch() as watch:
            for position in range(PROMPT_TOKENS, PROMPT_TOKENS + STEPS):
                tokens = await self._step(
                    [Slice([token], position, table, GREEDY) for token, table in zip(tokens, tables, strict=True)]
                )
        return watch.spent / STEPS

    def decode_reference(self, batch: int) -> Spent:
        longer = self._generate(self._prompts[:batch], 1 + STEPS)
        return (longer - self._generate(self._prompts[:batch], 1)) / STEPS

    async def prefill(self) -> Spent:
        (table,) = self._tables(1, PREFILL_TOKENS)
        with Stopwatch() as watch:
            await self._step([Slice(self._long[0].tolist(), 0, table, GREEDY)])
        return watch.spent

    def prefill_reference(self) -> Spent:
        return self._generate(self._long, 1)

    async def mixed(self) -> Spent:
        """One step: a token of each of some sequences, and a chunk of a prompt."""
        *tables, table = self._tables(MIXED_BATCH + 1, PREFILL_TOKENS)
        prompts = self._prompts[:MIXED_BATCH].tolist()
        tokens = await self._step([Slice(p, 0, t, GREEDY) for p, t in zip(prompts, tables, strict=True)])
        decoding = [Slice([token], PROMPT_TOKENS, t, GREEDY) for token, t in zip(tokens, tables, strict=True)]
        chunk = Slice(self._long[0, :MIXED_CHUNK].tolist(), 0, table, GREEDY)
        with Stopwatch() as watch:
            await self._step([*decoding, chunk])
        return watch.spent

    def decode_continuous(self, batch: int) -> Spent:
        return (self._continue(batch, 1 + STEPS) - self._continue(batch, 1)) / STEPS

    def _continue(self, batch: int, tokens: int) -> Spent:
        with Stopwatch() as watch:
            self._reference.generate_batch(
                inputs=self._prompts[:batch].tolist(),
                generation_config=GenerationConfig(
                    max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
                ),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=32,
                    num_blocks=256,
                    max_batch_tokens=512,
                    use_cuda_graph=False,
                    use_async_batching=False,
                    auto_switch_to_flash=False,
                ),
                progress_bar=False,
            )
        return watch.spent

    def _tables(self, batch: int, tokens: int) -> list[list[BlockId]]:
        each = self._engine.info.layout.entries_for(tokens)
        return [[BlockId(b) for b in range(row * each, (row + 1) * each)] for row in range(batch)]

    async def _step(self, slices: Sequence[Slice]) -> list[int]:
        return [token.id for token in await self._engine.step(Step(self._region, slices)) if token is not None]

    def _generate(self, prompts: torch.Tensor, tokens: int) -> Spent:
        with Stopwatch() as watch:
            self._reference.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return watch.spent


class Vllm:
    """A process that runs `engine_vllm.py`, stopped but for the time that it measures: its worker spins when idle."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._answer()  # that it is ready
        os.killpg(process.pid, signal.SIGSTOP)

    def measure(self, case: str) -> Spent:
        """CPU time is not known: it is that of several processes, one of which spins."""
        assert self._process.stdin is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        print(case, file=self._process.stdin, flush=True)
        answer = self._answer()
        os.killpg(self._process.pid, signal.SIGSTOP)
        return Spent(float(answer), float("nan"))

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("vLLM's process ended; what it said is on standard error")
        return line


@contextmanager
def vllm(python: str | None, folder: str, dtype: str, threads: int) -> Iterator[Vllm | None]:
    """None where there is no interpreter for it."""
    if not python:
        yield None
        return
    environment = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    process = subprocess.Popen(
        [python, "-c", "import engine_vllm; engine_vllm.run()", folder, dtype],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        yield Vllm(process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # all of its processes: some are left behind otherwise
        process.wait()


def index_building() -> list[Row]:
    """For a model of 32 layers and 8 KV heads, since that is where tables are long."""
    layout = KvLayout(layers=32, kv_heads=8, head_dim=128, block_tokens=16, dtype="bfloat16")
    geometry = Geometry(layout, 32, torch.bfloat16, torch.device("cpu"))
    return [
        Row(f"index building, {sequences} x {context} tokens", index_ms(geometry, sequences, context), "ms")
        for sequences, context in ((1, 128), (32, 128), (1, 4_000), (32, 4_000), (1, 50_000))
    ]


def index_ms(geometry: Geometry, sequences: int, context: int) -> float:
    table = [BlockId(block) for block in range(geometry.layout.entries_for(context))]
    slices = [Slice([0], context - 1, table, GREEDY)] * sequences
    taken = []
    for _ in range(21):
        with Stopwatch() as watch:
            for group in build(slices, geometry).groups:
                group.span(None, 0)
        taken.append(watch.spent.wall)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
