"""What others published, played by the simulator: orderings and sizes, and under which assumptions they come out.

Disaggregation: the rate per GPU at which 90 % of requests still meet a TTFT and a mean time between tokens, of the best
aggregated arrangement (chunked prefill, several chunk sizes and degrees of tensor parallelism) against that of the best
with separate prefill workers. NVIDIA Dynamo claims +30 % on one node and over 2x on two, for a 70B in fp8 on H100 with
prompts of 3,000 and answers of 150 tokens. TaiChi (arXiv 2508.01989): aggregation wins under a tight TTFT and a loose
time between tokens, disaggregation under the reverse.

Routing: eight instances that prefill 28,000 tokens a second, first come first served, and decode at 30 ms a token that
nothing disturbs, each with 6,000 blocks of 512 tokens of prefix cache; the router knows their queues exactly. Played
with Mooncake's traces where --traces names a folder that has them.

Transfers: what vLLM with Mooncake and NIXL were measured to take, over the presets' links.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
from report import Row, emit

from penstock import clock, plugin
from penstock.blocks import BlockId, KvLayout
from penstock.fabric import Fabric
from penstock.measures import spread
from penstock.policy.latency.fit import believe
from penstock.policy.latency.steps import StepModel
from penstock.policy.latency.transfers import MOONCAKE_8X400G, NIXL_H100_READ
from penstock.policy.routing import dynamo
from penstock.policy.routing.api import Ask, Choice, Fleet, Route
from penstock.sim.cluster import ClusterSpec
from penstock.sim.cluster_file import described
from penstock.sim.loop import run_virtual
from penstock.sim.network import Network
from penstock.sim.record import Recorder, Requests
from penstock.sim.simulation import simulate
from penstock.sim.transport import FabricHub, FabricTransport, Software
from penstock.sim.wiring import Wiring
from penstock.transport.memory import bare_region
from penstock.workloads.mooncake_like import mooncake_like
from penstock.workloads.named import find
from penstock.workloads.traces import mooncake
from penstock.workloads.workload import Workload

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="one node, three targets, short runs")
    parser.add_argument(
        "--traces", type=Path, help="folder of mooncake_conversation.jsonl and mooncake_synthetic.jsonl"
    )
    parser.add_argument("--only", choices=("goodput", "routing", "transfers"), help="one part")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    parts: dict[str, Callable[[ProcessPoolExecutor], list[Row]]] = {
        "transfers": lambda pool: transfer_rows(),
        "goodput": lambda pool: goodput_rows(pool, arguments.quick),
        "routing": lambda pool: routing_rows(pool, arguments.traces, arguments.quick),
    }
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        rows = [row for name, part in parts.items() if arguments.only in (None, name) for row in part(pool)]
    emit(rows, arguments.json)


def worst(what: str, rows: Sequence[Row], aim_percent: float) -> Row:
    """How far the furthest of `rows` is from its reference."""
    off = max(abs(row.ratio - 1) for row in rows if row.ratio is not None)
    return Row(f"{what}, furthest off", 100 * off, "%", aim=aim_percent)


# Disaggregation against aggregation

ATTAINED = 0.9
GRID = 1.05  # rates that are tried are this far apart
LEAST_REQUESTS = 100
LEAST_PER_GPU = 0.05  # requests a second


@dataclass(frozen=True, slots=True)
class Target:
    """Of a request: its TTFT, and the mean time between its tokens."""

    ttft_s: float
    tpot_s: float

    @property
    def text(self) -> str:
        return f"TTFT {self.ttft_s:g} s, TPOT {self.tpot_s * 1e3:g} ms"


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Workers as (role, count, GPUs each, tokens of a step)."""

    name: str
    workers: tuple[tuple[str, int, int, int], ...]

    @property
    def is_split(self) -> bool:
        return len(self.workers) > 1


@dataclass(frozen=True, slots=True)
class Claim:
    """What was published of the best that is split: so many times the rate of the best that is not, or at most that."""

    ratio: float
    at_least: bool = True


@dataclass(frozen=True, slots=True)
class Setting:
    """A machine, a model, and what is asked: lengths are log-normal with `spread` as coefficient of variation."""

    name: str
    topology: str
    gpus: int
    model: str
    dtype: str
    input_tokens: int
    output_tokens: int
    spread: float
    targets: tuple[Target, ...]
    claims: tuple[Claim | None, ...]  # for each target
    arrangements: tuple[Arrangement, ...]
    baseline: str = ""  # only such aggregated arrangements count


def whole(*workers: tuple[int, int], chunks: Sequence[int]) -> tuple[Arrangement, ...]:
    """Aggregated: each (count, GPUs) with each chunk size."""
    return tuple(
        Arrangement(f"{count} x TP{gpus}, chunks of {chunk}", (("any", count, gpus, chunk),))
        for count, gpus in workers
        for chunk in chunks
    )


def split(*pools: tuple[tuple[int, int], tuple[int, int]]) -> tuple[Arrangement, ...]:
    """Disaggregated: (count, GPUs) of prefill and of decode workers."""
    return tuple(
        Arrangement(f"{p} x TP{p_gpus} + {d} x TP{d_gpus}", (("prefill", p, p_gpus, 8192), ("decode", d, d_gpus, 2048)))
        for (p, p_gpus), (d, d_gpus) in pools
    )


CHUNKS = (256, 512, 2048)
LEVELS = (Target(2.0, 0.015), Target(2.0, 0.025), Target(2.0, 0.05))
ONE_NODE = Setting(
    "70B fp8, one H100 node, 3000 in 150 out",
    "hgx-h100",
    *(8, "llama-3-70b", "fp8", 3_000, 150, 0.0),
    LEVELS,
    (Claim(1.3),) * 3,
    whole((4, 2), (2, 4), (1, 8), chunks=CHUNKS)
    + split(((4, 1), (1, 4)), ((2, 2), (1, 4)), ((1, 4), (1, 4)), ((6, 1), (1, 2)), ((3, 2), (1, 2))),
)
TWO_NODES = replace(
    ONE_NODE,
    name="70B fp8, two H100 nodes, 3000 in 150 out",
    topology="{preset: hgx-h100, count: 2}",
    gpus=16,
    claims=(Claim(2.0),) * 3,
    arrangements=whole((8, 2), (4, 4), (2, 8), chunks=CHUNKS)
    + split(((8, 1), (1, 8)), ((8, 1), (2, 4)), ((4, 2), (2, 4)), ((12, 1), (1, 4)), ((10, 1), (3, 2))),
)
PUBLISHED_BASELINE = replace(TWO_NODES, name=f"{TWO_NODES.name}, against TP8 only", baseline="TP8")
H200_BF16 = replace(
    ONE_NODE,
    name="70B bf16, one H200 node, 3000 in 150 out",
    topology="hgx-h200",
    dtype="bfloat16",
    targets=(Target(2.0, 0.02), Target(2.0, 0.03), Target(2.0, 0.06)),
    arrangements=whole((4, 2), (2, 4), (1, 8), chunks=CHUNKS)
    + split(((2, 2), (1, 4)), ((1, 4), (1, 4)), ((3, 2), (1, 2))),
)
TAICHI = Setting(
    "32B bf16, 8 x A100, log-normal 3000 in 250 out",
    "hgx-a100",
    *(8, "qwen3-32b", "bfloat16", 3_000, 250, 0.8),
    (Target(1.5, 0.15), Target(4.0, 0.06), Target(10.0, 0.033)),
    (Claim(1.0, at_least=False), None, Claim(1.0)),
    whole((4, 2), chunks=CHUNKS) + split(((1, 2), (3, 2)), ((2, 2), (2, 2)), ((3, 2), (1, 2))),
)


def goodput_rows(pool: ProcessPoolExecutor, quick: bool) -> list[Row]:
    few = replace(ONE_NODE, arrangements=tuple(a for a in ONE_NODE.arrangements if "2048" not in a.name))
    settings = (few, TAICHI) if quick else (ONE_NODE, TWO_NODES, H200_BF16, TAICHI)
    last_s = 10.0 if quick else 30.0  # short runs flatter whoever is overloaded: its queue has no time to grow
    wanted = {
        (setting, arrangement): pool.submit(capacities, setting, arrangement, last_s)
        for setting in settings
        for arrangement in setting.arrangements
    }
    found = {key: future.result() for key, future in wanted.items()}
    rows = []
    for setting in (*settings, *(() if quick else (PUBLISHED_BASELINE,))):
        played = {a: rates for (other, a), rates in found.items() if other.arrangements == setting.arrangements}
        rows += [compared(setting, index, played) for index in range(len(setting.targets))]
    return rows


def compared(setting: Setting, index: int, played: dict[Arrangement, list[float]]) -> Row:
    """The best that is split against the best that is not, in requests a second for each GPU."""
    split_rate, split_name = max((rates[index], a.name) for a, rates in played.items() if a.is_split)
    whole_rate, whole_name = max(
        (rates[index], a.name) for a, rates in played.items() if not a.is_split and setting.baseline in a.name
    )
    claim = setting.claims[index]
    return Row(
        f"{setting.name}: {setting.targets[index].text}: {split_name}",
        split_rate / setting.gpus,
        "req/s/GPU",
        whole_name,
        whole_rate / setting.gpus,
        claim.ratio if claim else None,
        more_is_better=claim is None or claim.at_least,
    )


def capacities(setting: Setting, arrangement: Arrangement, last_s: float) -> list[float]:
    """For each target the highest rate at which it is met, in requests a second; 0 if it is met at none."""

    @cache
    def met(step: int) -> tuple[float, ...]:
        return attained(setting, arrangement, least * GRID**step, last_s)

    least = LEAST_PER_GPU * setting.gpus
    return [highest(lambda step, index=index: met(step)[index], least) for index in range(len(setting.targets))]


def highest(met: Callable[[int], float], least: float) -> float:
    """By bisection over the grid of rates."""
    low, high = -1, round(math.log(80) / math.log(GRID))  # 4 a GPU
    while high - low > 1:
        middle = (low + high) // 2
        if met(middle) >= ATTAINED:
            low = middle
        else:
            high = middle
    return 0.0 if low < 0 else least * GRID**low


def attained(setting: Setting, arrangement: Arrangement, rate: float, last_s: float) -> tuple[float, ...]:
    """The share of requests that meet each target at this rate, kept up for `last_s`."""
    requests = max(LEAST_REQUESTS, round(rate * last_s))
    spreads = f"input_cv={setting.spread},output_cv={setting.spread}"
    lengths = f"input={setting.input_tokens},output={setting.output_tokens},{spreads}"
    workload = find(f"poisson:rate={rate},{lengths},requests={requests},seed={SEED}").truncated(12_000, 2_000)
    recorder = Recorder()
    simulate(arranged(setting, arrangement), workload, "p_token", SEED, recorder)
    asked = recorder.requests()
    ttft_s = asked.first_s - asked.begun_s
    tpot_s = (asked.last_s - asked.first_s) / np.maximum(1, asked.output_tokens - 1)
    ok = asked.error == 0
    return tuple(
        float(np.mean(ok & (ttft_s <= target.ttft_s) & (tpot_s <= target.tpot_s))) for target in setting.targets
    )


def arranged(setting: Setting, arrangement: Arrangement) -> ClusterSpec:
    workers = "\n".join(
        f"  - {{role: {role}, count: {count}, gpus: {gpus}, step_tokens: {tokens}}}"
        for role, count, gpus, tokens in arrangement.workers
    )
    return described(
        f"topology: {setting.topology}\nmodel: {setting.model}\ndtype: {setting.dtype}\nblock_tokens: 64\n"
        f"max_context_tokens: 14000\nmax_queued: 100000\nworkers:\n{workers}",
        arrangement.name,
    )


# Routing

INSTANCES = 8
PREFILL_TOKENS_PER_S = 28_000
STEP_S = 0.03
BLOCKS = 6_000
TABLE = """
topology: {preset: hgx-h100, count: 2}
model: llama-3-8b
max_queued: 1000000
message: 1 us
report: 600 s
workers:
  - {role: prefill, count: 8, step_tokens: 2048, max_running: 100000}
  - {role: decode, count: 8, step_tokens: 100000, max_running: 100000}
"""
POLICIES: dict[str, Callable[[], Route]] = {
    "round_robin": lambda: plugin.find("policy.routing", "round_robin").ROUTING,
    "least_loaded": lambda: plugin.find("policy.routing", "least_loaded").ROUTING,
    "dynamo, scale 1": lambda: dynamo.scaled(1),
    "dynamo, scale 4": lambda: dynamo.scaled(4),
    "dynamo, scale 16": lambda: dynamo.scaled(16),
    "p_token": lambda: plugin.find("policy.routing", "p_token").ROUTING,
    "lmetric": lambda: plugin.find("policy.routing", "lmetric").ROUTING,
    "prefix_affinity": lambda: plugin.find("policy.routing", "prefix_affinity").ROUTING,
}
# Seconds of mean and P99 TTFT, and the share of prompts found in caches where it was published.
PUBLISHED: dict[tuple[str, float], dict[str, tuple[float, float, float | None]]] = {
    ("conversation", 1): {
        "round_robin": (0.49, 3.39, 0.11),
        "p_token": (0.31, 2.62, 0.33),
    },
    ("conversation", 4): {
        "round_robin": (1.06, 5.82, None),
        "dynamo, scale 1": (0.64, 3.10, None),
        "p_token": (0.35, 2.71, 0.31),
        "lmetric": (0.39, 3.52, None),
    },
    ("conversation", 6): {
        "round_robin": (6.47, 18.8, None),
        "least_loaded": (4.43, 13.5, None),
        "dynamo, scale 1": (1.29, 4.45, None),
        "dynamo, scale 4": (0.71, 3.13, None),
        "dynamo, scale 16": (0.53, 2.93, None),
        "p_token": (0.50, 2.88, 0.30),
        "lmetric": (0.61, 5.71, None),
        "prefix_affinity": (1.45, 6.98, 0.34),
    },
    ("conversation", 8): {
        "round_robin": (69, 143, None),
        "dynamo, scale 1": (31, 56, None),
        "p_token": (11.1, 17.3, 0.285),
        "lmetric": (7.0, 22.6, None),
        "prefix_affinity": (3.9, 13.2, 0.336),
    },
    ("synthetic", 4): {
        "round_robin": (2.84, 13.3, 0.20),
        "least_loaded": (2.26, 9.4, None),
        "dynamo, scale 1": (0.45, 2.29, 0.47),
        "dynamo, scale 4": (0.27, 1.89, None),
        "dynamo, scale 16": (0.24, 1.83, 0.62),
        "p_token": (0.24, 1.86, None),
        "lmetric": (0.34, 3.74, None),
        "prefix_affinity": (0.50, 3.97, 0.64),
    },
}


@dataclass(frozen=True, slots=True)
class Routed:
    mean_s: float
    p99_s: float
    hits: float


def routing_rows(pool: ProcessPoolExecutor, traces: Path | None, quick: bool) -> list[Row]:
    """Without the traces nothing is compared: the generator has the conversation's statistics, not its requests."""
    if traces is None or quick:
        note = "routing: a generator stands in for the conversation trace, and the synthetic one is left out"
        print(note, file=sys.stderr)
        names = ("round_robin", "p_token", "lmetric")
        future = {name: pool.submit(routed, None, 6.0, name, True, 1_500) for name in names}
        return [
            Row(f"generated conversation x6, {name}: mean TTFT", future[name].result().mean_s, "s") for name in names
        ]
    cells = [(trace, rate, name) for (trace, rate), row in PUBLISHED.items() for name in row]
    futures = {cell: pool.submit(routed, traces, cell[1], cell[2], True, None, cell[0]) for cell in cells}
    blind = pool.submit(routed, traces, 6.0, "p_token", False, None, "conversation").result()
    rows = [
        row for (trace, rate, name), future in futures.items() for row in against(trace, rate, name, future.result())
    ]
    means = [row for row in rows if row.unit == "s mean" and "prefix_affinity" not in row.name]  # has other thresholds
    exact = futures["conversation", 6, "p_token"].result()
    return [
        *rows,
        worst("mean TTFT of the same policies", means, 10),
        Row("conversation x6, p_token, what the router itself knows", blind.mean_s, "s", "exact queues", exact.mean_s),
    ]


def against(trace: str, rate: float, name: str, got: Routed) -> list[Row]:
    mean_s, p99_s, hits = PUBLISHED[trace, rate][name]
    cell = f"{trace} x{rate:g}, {name}"
    rows = [
        Row(f"{cell}: mean TTFT", got.mean_s, "s mean", "published", mean_s),
        Row(f"{cell}: P99 TTFT", got.p99_s, "s", "published", p99_s),
    ]
    return [*rows, Row(f"{cell}: hits", got.hits, "of tokens", "published", hits)] if hits else rows


def routed(traces: Path | None, rate: float, name: str, exact: bool, requests: int | None, trace: str = "") -> Routed:
    """With `exact` the policy knows the queues as they are, else what the router believes."""
    workload: Workload = mooncake(traces / f"mooncake_{trace}.jsonl") if traces else mooncake_like(SEED, requests or 1)
    recorder = Recorder()
    simulate(crude_cluster(), workload.faster(rate), over_instances(POLICIES[name](), exact), SEED, recorder)
    asked: Requests = recorder.requests()
    ttft = spread(asked.first_s - asked.begun_s)
    assert ttft is not None and not asked.error.any(), "every request of the table is answered"
    return Routed(ttft.mean, ttft.p99, float(asked.cached_tokens.sum() / asked.prompt_tokens.sum()))


def crude_cluster() -> ClusterSpec:
    """An instance is a prefill worker and a decode worker: so nothing disturbs decoding. KV moves in no time."""
    cluster = described(TABLE, "the routing table")
    prices = {"prefill": (1e-9, 1 / PREFILL_TOKENS_PER_S, 0, 0, 0), "decode": (STEP_S, 0, 0, 0, 0)}
    models = {role: StepModel(believe(price, 0.01, [1e-12] * len(price))) for role, price in prices.items()}
    workers = tuple(replace(w, step_model=models[w.role], kv_blocks=BLOCKS) for w in cluster.workers)
    return replace(cluster, layout=KvLayout(1, 1, 1, 512, "bfloat16"), workers=workers, max_context_tokens=200_000)


def over_instances(route: Route, exact: bool) -> Route:
    """`route` as it chooses among workers that do everything, over instances."""
    busy_until_s = np.zeros(INSTANCES)

    def choose(now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
        columns = {name: column for column, name in enumerate(fleet.names)}
        prefill = np.array([columns[f"prefill-{number}"] for number in range(INSTANCES)])
        decode = np.array([columns[f"decode-{number}"] for number in range(INSTANCES)])
        queued = np.maximum(0, busy_until_s - now) * PREFILL_TOKENS_PER_S if exact else fleet.queued_tokens[prefill]
        asked = replace(ask, cached_tokens=ask.cached_tokens[prefill])
        chosen = int(route(now, asked, instances(fleet, prefill, decode, queued), rng).decode)
        computed_s = float(asked.uncached_tokens[chosen]) / PREFILL_TOKENS_PER_S
        busy_until_s[chosen] = max(now, busy_until_s[chosen]) + computed_s
        # The wait is told as less than nothing, so that the decode worker never computes a prompt itself.
        return Choice(f"decode-{chosen}", (f"prefill-{chosen}",), 0.0, wait_s=-math.inf)

    return choose


def instances(fleet: Fleet, prefill: np.ndarray, decode: np.ndarray, queued_tokens: np.ndarray) -> Fleet:
    """What `route` sees of them, named by their numbers."""
    everybody, nobody = np.full(INSTANCES, True), np.full(INSTANCES, -1)
    return replace(
        fleet,
        names=[str(number) for number in range(INSTANCES)],
        prefers_prefill=everybody,
        prefers_decode=everybody,
        memory=nobody,
        network=nobody,
        queued_tokens=queued_tokens,
        prefills=fleet.prefills[prefill],
        streams=fleet.streams[decode],
        used_blocks=fleet.used_blocks[decode],
        blocks=fleet.blocks[prefill],
        block_tokens=fleet.block_tokens[prefill],
        _paths={},
    ).only(everybody)


# Transfers

ROCE_MS = {20e6: 0.54, 146e6: 1.50, 1.13e9: 8.84, 4.5e9: 31.65}
READ_GB_PER_S = {64: 5.2, 128: 10.3, 256: 19.9}  # by KiB of a block
QWEN3_8B = KvLayout(36, 8, 128, 1, "bfloat16")
ROCE = """
topology: {{holds: [{{preset: hgx-h100, count: 2{nic}}}]}}
model: qwen3-8b
workers: [{{role: any, count: 2, gpus: 8}}]
"""
# Their peak, 142 GB/s, is given as 71 % of 200: eight ports of 25 GB/s, though 400G is 50. Presets take 72 % of a port.
AS_MEASURED = ", nic: {bandwidth: 18 GB/s}"
INSIDE = "topology: hgx-h100\nmodel: llama-3-8b\nworkers: [{role: any, count: 2}]"
READS = 2_000


def transfer_rows() -> list[Row]:
    mooncake_start_s = MOONCAKE_8X400G.line.prices[0]
    nixl_start_s, nixl_block_s = NIXL_H100_READ.line.prices[:2]
    roce = [
        Row(
            f"vLLM with Mooncake, 8 x RoCE at 25 GB/s: {size / 1e6:g} MB",
            moved_s(described(ROCE.format(nic=AS_MEASURED), "RoCE"), QWEN3_8B, size, Software(mooncake_start_s)) * 1e3,
            *("ms", "published", ms),
        )
        for size, ms in ROCE_MS.items()
    ]
    reads = []
    for kib, rate in READ_GB_PER_S.items():
        layout = KvLayout(1, 8, 128, kib // 4, "bfloat16")
        size = READS * layout.block_bytes
        took_s = moved_s(described(INSIDE, "one node"), layout, size, Software(nixl_start_s, nixl_block_s))
        reads.append(
            Row(f"NIXL READ of {kib} KiB blocks in an H100 node", size / took_s / 1e9, "GB/s", "published", rate)
        )
    preset_s = moved_s(described(ROCE.format(nic=""), "RoCE"), QWEN3_8B, 4.5e9, Software(mooncake_start_s))
    return [
        *(*roce, *reads),
        worst("transfers", [*roce, *reads], 10),
        Row("the same 4500 MB over the preset's 8 x 400G ports", preset_s * 1e3, "ms", "published", ROCE_MS[4.5e9]),
    ]


def moved_s(cluster: ClusterSpec, layout: KvLayout, size_bytes: float, software: Software) -> float:
    """From the first worker to the second, nobody else being on the links."""
    devices = [worker.devices for worker in cluster.workers]
    return run_virtual(_move(cluster.fabric, devices, layout, round(size_bytes / layout.block_bytes), software))


async def _move(
    fabric: Fabric, devices: Sequence[tuple[str, ...]], layout: KvLayout, blocks: int, software: Software
) -> float:
    network = Network()
    wiring = Wiring(fabric, network)
    for name, places in zip("ab", devices, strict=True):
        wiring.place(name, places)
    transport = FabricTransport(FabricHub(network, wiring, software=software))
    async with (
        bare_region("a", 1, layout, blocks) as source,
        bare_region("b", 1, layout, blocks) as target,
        transport.export(target) as exported,
        transport.connect(exported.offer, source, "a:1", "bench", lambda: None) as pipe,
    ):
        begun_s = clock.now()
        pipe.write([(BlockId(block), BlockId(block)) for block in range(blocks)])
        await pipe.flush()
        return clock.now() - begun_s


if __name__ == "__main__":
    main()
