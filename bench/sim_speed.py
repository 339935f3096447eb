"""What a simulated request costs: CPU time of the whole program, on one core, on virtual time.

The first row plays Mooncake's conversation trace (12,031 requests; its file with --trace, else a generator with its
statistics) at twice its speed against 64 H100: 16 workers of Llama-3-70B on four GPUs each, half of them prefilling.
The others play text of the same kind against 8 to 4,096 GPUs, so fast that every GPU is as busy, and last more requests
of it. The reference is the cost per request at 64 GPUs in the same run: at most linear means a ratio of about one.
Memory is the most that a process of its own ever held; --profile says where the time of the first row goes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from report import Row, emit

from penstock.sim.cluster_file import described
from penstock.sim.record import Recorder
from penstock.sim.simulation import simulate
from penstock.workloads.mooncake_like import mooncake_like
from penstock.workloads.traces import mooncake

CLUSTER = """
topology: {{kind: rack, count: {racks}, holds: [{{preset: hgx-h100, count: {nodes}}}], oversubscription: 2}}
model: llama-3-70b
workers:
  - {{role: prefill, count: {pairs}, gpus: 4}}
  - {{role: decode, count: {pairs}, gpus: 4}}
max_queued: 4096
"""
GPUS = 64
TRACE_REQUESTS = 12_031
SPEED = 2.0  # of the trace, at 64 GPUs
AIM_S, STRETCH_S = 60.0, 20.0
POLICY = "p_token"


class Cost(NamedTuple):
    """Of one run."""

    requests: int
    errors: int
    cpu_s: float
    memory_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="fewer requests and no more than 512 GPUs")
    parser.add_argument("--trace", type=Path, help="Mooncake's conversation_trace.jsonl")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, and nothing else")
    arguments = parser.parse_args()
    if arguments.profile:
        profile(arguments.trace)
        return
    requests = 3_000 if arguments.quick else TRACE_REQUESTS
    sizes = (8, 64, 512) if arguments.quick else (8, 64, 512, 4_096)
    many = () if arguments.quick else (300_000,)
    emit(rows(arguments.trace, requests, sizes, many), arguments.json)


def rows(trace: Path | None, requests: int, sizes: tuple[int, ...], many: tuple[int, ...]) -> list[Row]:
    whole = alone(GPUS, requests, trace)
    name = "Mooncake's conversation trace" if trace else "generated conversations"
    found = [
        Row(f"{name}, {requests} requests, 64 GPUs", whole.cpu_s, "s CPU", aim=AIM_S),
        Row("the same, stretch", whole.cpu_s, "s CPU", aim=STRETCH_S),
        Row("the same, requests that failed", whole.errors, "requests", aim=0),
    ]
    base = per_request(alone(GPUS, min(sizes[-1] * 12, requests), None))
    for gpus in sizes:
        cost = alone(gpus, max(1_000, min(gpus * 12, 2 * requests)), None)
        found.append(Row(f"{gpus} GPUs, {cost.requests} requests", per_request(cost), "ms CPU", "64 GPUs", base, aim=2))
    for count in many:
        cost = alone(GPUS, count, None)
        found.append(Row(f"64 GPUs, {count} requests", per_request(cost), "ms CPU", "fewer", base, aim=1.2))
        found.append(Row("   memory", cost.memory_bytes / 2**20, "MiB", "12,031", whole.memory_bytes / 2**20))
    return found


def per_request(cost: Cost) -> float:
    return 1e3 * cost.cpu_s / cost.requests


def alone(gpus: int, requests: int, trace: Path | None) -> Cost:
    """In a process of its own, so that memory is this run's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run, gpus, requests, trace).result()


def run(gpus: int, requests: int, trace: Path | None) -> Cost:
    nodes = max(1, gpus // 8)
    cluster = described(CLUSTER.format(racks=max(1, nodes // 8), nodes=min(8, nodes), pairs=gpus // 8), "bench")
    text = mooncake(trace) if trace else mooncake_like(seed=0, requests=requests)
    workload = text.faster(SPEED * gpus / GPUS).of_requests(requests)
    recorder = Recorder()
    begun_s = time.process_time()
    simulate(cluster, workload, POLICY, 0, recorder)
    cpu_s = time.process_time() - begun_s
    told = recorder.requests()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Cost(len(told.begun_s), int((told.error > 0).sum()), cpu_s, memory)


def profile(trace: Path | None) -> None:
    profiler = cProfile.Profile()
    profiler.runcall(run, GPUS, 3_000, trace)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
