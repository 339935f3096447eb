"""What routing policies are worth: named cells of workload, cluster and load, all policies on the same requests.

The whole serving path runs on virtual time. 70B-class KV (320 KiB a token), one NIC of 35 GB/s for each worker. Loads
are shares of capacity: of the rate at which the workers' seconds would just do if every prompt that was seen before
were cached. The seed chooses the part of the trace, the sessions, and how ties fall; the policies of a row have the
same ones, so differences are paired. The bar is the best baseline of each cell; a difference counts beyond the noise:
twice the standard error of the paired differences.

TTFT is to the first token, which comes from prefill. The second waits for KV: `wait for the second` is the gap between.
Goodput is requests per second with TTFT up to 3 s and up to 50 ms a token. Scarce bytes are those that crossed the
highest tier that any of this cell's transfers crossed, by whatever policy.

    python bench/routing_quality.py --traces FOLDER                     the full grid: 12 cells, 3 seeds, all policies
    python bench/routing_quality.py --ablate                            what each term of the price is worth
    python bench/routing_quality.py --cells conversation-tree-0.9 --policies pairs,p_token,netkv --requests 500
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from report import Row, emit
from rich.console import Console
from rich.table import Table

from penstock.measures import spread
from penstock.policy.latency.steps import decode
from penstock.policy.routing import pairs
from penstock.sim.cluster import ClusterSpec
from penstock.sim.cluster_file import described
from penstock.sim.record import Recorder
from penstock.sim.simulation import simulate
from penstock.workloads.generated import AGENT, Poisson, generated
from penstock.workloads.mooncake_like import mooncake_like
from penstock.workloads.traces import mooncake
from penstock.workloads.workload import BLOCK_TOKENS, Workload

OURS = "pairs"
BASELINES = (
    *("p_token", "netkv", "lmetric", "dynamo", "prefix_affinity"),
    *("least_loaded", "power_of_two", "round_robin", "random"),
)
SLO_TTFT_S, SLO_TPOT_S = 3.0, 0.05
TERMS = {f"{OURS} without {term}": term for term in pairs.TERMS}
BATCH, DEPTH = 64, 8_192  # of a decode step that capacity is reckoned with
WHOLE = 131_072  # tokens of a step of engines that hand over after prefill
REQUESTS, SEEDS = 1_500, 3

NODE = "topology: {preset: hgx-h200, count: 1}"
TREE = """
topology:
  holds:
    - kind: pod
      count: 2
      oversubscription: 2
      holds:
        - kind: rack
          count: 2
          oversubscription: 2
          holds: [{preset: hgx-h100, count: 2, nics: 2, nic: {bandwidth: %s GB/s}}]
"""
NVL72 = "topology: gb200-nvl72"
SPLIT = "[{role: prefill, count: %d, gpus: %d, step_tokens: %d}, {role: decode, count: %d, gpus: %d}]"
SHARED = "[{role: any, count: %d, gpus: %d, step_tokens: 2048}]"


@dataclass(frozen=True, slots=True)
class Cell:
    """`load` is a share of capacity. Where `is_felt` transfers are not hidden by compute."""

    workload: str
    place: str
    load: float
    workers: str
    topology: str
    is_felt: bool = False

    @property
    def name(self) -> str:
        return f"{self.workload}-{self.place}-{self.load:g}"

    def cluster(self) -> ClusterSpec:
        text = f"{self.topology}\nmodel: llama-3-70b\nmax_queued: 100000\nworkers: {self.workers}\n"
        return described(text, self.name)


def split(pairs: int, gpus: int, step_tokens: int = 8_192) -> str:
    return SPLIT % (pairs, gpus, step_tokens, pairs, gpus)


FAST, SLOW = TREE % "35", TREE % "9"
CELLS = (
    Cell("conversation", "node-shared", 0.6, SHARED % (4, 2), NODE),
    Cell("conversation", "node", 0.9, split(2, 2), NODE),
    Cell("conversation", "tree-shared", 0.9, SHARED % (16, 4), FAST),
    Cell("conversation", "tree", 0.6, split(8, 4), FAST),
    Cell("conversation", "tree", 0.9, split(8, 4), FAST),
    Cell("conversation", "tree", 1.2, split(8, 4), FAST),
    Cell("conversation", "tree-100g-after", 0.6, split(4, 8, WHOLE), SLOW, is_felt=True),
    Cell("synthetic", "tree", 0.9, split(8, 4), FAST),
    Cell("synthetic", "nvl72", 0.9, split(9, 4), NVL72),
    Cell("synthetic", "node-shared", 1.2, SHARED % (4, 2), NODE),
    Cell("agent", "tree", 0.9, split(8, 4), FAST),
    Cell("agent", "tree-100g", 0.6, split(4, 8), SLOW, is_felt=True),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one run. `tier_bytes` by the kind of the lowest domain that both ends are in."""

    ttft_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    second_s: float
    second_p99_s: float
    itl_s: float
    goodput: float
    hits: float
    errors: int
    tier_bytes: tuple[tuple[str, float], ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="two cells, one seed, 300 requests, four policies")
    parser.add_argument(
        "--traces", type=Path, help="folder of mooncake_conversation.jsonl and mooncake_synthetic.jsonl"
    )
    parser.add_argument("--cells", help="names, by commas; default: all")
    parser.add_argument("--policies", default=",".join((OURS, *BASELINES)))
    parser.add_argument("--ablate", action="store_true", help="pairs, and pairs with each term left out, instead")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    cells, policies = chosen(arguments.cells), arguments.policies.split(",")
    if arguments.ablate:
        policies = [OURS, *(f"{OURS} without {term}" for term in pairs.TERMS)]
    seeds, requests = range(arguments.first_seed, arguments.first_seed + arguments.seeds), arguments.requests
    if arguments.quick:
        cells, policies = (CELLS[4], CELLS[6]), [OURS, "p_token", "netkv", "round_robin"]
        seeds, requests = range(1), 300
    if arguments.traces is None:
        print("generators stand in for the traces; the synthetic trace has none but conversations", file=sys.stderr)
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        futures = {
            (cell.name, policy, seed): pool.submit(run, cell, policy, seed, requests, arguments.traces)
            for cell in cells
            for policy in policies
            for seed in seeds
        }
        for cell in cells:
            outcomes = {name: [futures[cell.name, name, seed].result() for seed in seeds] for name in policies}
            if not arguments.json:
                Console(width=150).print(table(cell, outcomes))
            emit((ablations if arguments.ablate else verdicts)(cell, outcomes), arguments.json)
            sys.stdout.flush()


def chosen(names: str | None) -> Sequence[Cell]:
    by_name = {cell.name: cell for cell in CELLS}
    if names is None:
        return CELLS
    if unknown := [name for name in names.split(",") if name not in by_name]:
        sys.exit(f"there is no cell {unknown[0]!r}; there is {', '.join(by_name)}")
    return [by_name[name] for name in names.split(",")]


def run(cell: Cell, policy: str, seed: int, requests: int, traces: Path | None) -> Outcome:
    """One policy on one part of one workload."""
    cluster = cell.cluster()
    recorder = Recorder()
    route = pairs.without(TERMS[policy]) if policy in TERMS else policy
    simulate(cluster, workload(cell, seed, requests, traces), route, seed, recorder)
    asked = recorder.requests()
    ttft, second = asked.first_s - asked.begun_s, asked.second_s - asked.first_s
    tpot = (asked.last_s - asked.first_s) / np.maximum(1, asked.output_tokens - 1)
    is_good = (ttft <= SLO_TTFT_S) & (tpot <= SLO_TPOT_S) & (asked.error == 0)
    first, later = spread(ttft), spread(second)
    assert first is not None and later is not None, "some requests are answered"
    lasted_s = float(np.nanmax(asked.ended_s) - asked.begun_s[0])
    by_tier: dict[str, float] = {}
    devices = {worker.name: worker.devices[0] for worker in cluster.workers}
    names = recorder.worker_names
    for row in np.flatnonzero(asked.copied_bytes):
        ends = (devices[names[asked.prefill_worker[row]]], devices[names[asked.decode_worker[row]]])
        kind = cluster.fabric.vertex(cluster.fabric.lowest_common_domain(*ends)).kind
        by_tier[kind] = by_tier.get(kind, 0.0) + float(asked.copied_bytes[row])
    return Outcome(
        first.mean,
        first.p50,
        first.p99,
        later.mean,
        later.p99,
        recorder.gaps.total / max(1, recorder.gaps.count),
        float(is_good.sum()) / lasted_s,
        float(asked.cached_tokens.sum() / asked.prompt_tokens.sum()),
        int((asked.error > 0).sum()),
        tuple(by_tier.items()),
    )


# Workloads


def workload(cell: Cell, seed: int, requests: int, traces: Path | None) -> Workload:
    """Its requests come at `cell.load` of the cluster's capacity."""
    slow = natural(cell.workload, seed, requests, traces)
    asked, lasts_s = list(demands(slow)), max(session.start_s for session in slow)
    per_s = cell.load * capacity(cell.cluster(), asked)
    return slow.faster(per_s * lasts_s / len(asked))


@cache
def natural(name: str, seed: int, requests: int, traces: Path | None) -> Workload:
    if name == "agent":
        return generated(Poisson(1.0), AGENT, seed).of_requests(requests)
    if traces is None:
        return mooncake_like(seed + (1_000 if name == "synthetic" else 0), requests)
    sessions = list(islice(mooncake(traces / f"mooncake_{name}.jsonl"), seed * requests, (seed + 1) * requests))
    if len(sessions) < requests:
        sys.exit(f"the trace {name} has no {requests} requests for seed {seed}: ask for fewer")
    begin_s = sessions[0].start_s
    return Workload(lambda: iter(sessions)).delayed(-begin_s)


def demands(requests: Workload) -> Iterator[tuple[int, int, int]]:
    """Of each request: prompt tokens, those of them that somebody asked before, and tokens of the answer."""
    seen: set[int] = set()
    for session in requests:
        said = 0
        for turn in session.turns:
            known = 0
            for block in turn.blocks:
                if block not in seen:
                    break
                known += BLOCK_TOKENS
            seen.update(turn.blocks)
            prompt = said + turn.tokens
            yield prompt, min(prompt - 1, said + known), turn.output_tokens
            said = prompt + turn.output_tokens


def capacity(cluster: ClusterSpec, asked: Sequence[tuple[int, int, int]]) -> float:
    """Requests a second that keep the busier role of workers just busy."""
    prefill_s = decode_s = 0.0
    for worker in cluster.workers[:2]:
        model = worker.step_model
        if worker.role != "decode":
            prefill_s = sum(model.prompt_s(p - known, known, worker.step_tokens) for p, known, _ in asked) / len(asked)
        if worker.role != "prefill":
            step_s = model.seconds(decode(BATCH, BATCH * DEPTH))
            decode_s = sum(output for *_, output in asked) / len(asked) * step_s / BATCH
    roles = [worker.role for worker in cluster.workers]
    if "any" in roles:
        return len(roles) / (prefill_s + decode_s)
    return min(roles.count("prefill") / prefill_s, roles.count("decode") / decode_s)


# What came out


def table(cell: Cell, outcomes: dict[str, list[Outcome]]) -> Table:
    shown = Table(*("policy", "TTFT", "p50", "p99", "second", "p99", "ITL ms", "goodput", "hits", "errors"), "GB moved")
    shown.title = cell.name
    for name, runs in outcomes.items():
        mean = [float(np.mean(column)) for column in zip(*(astuple(run) for run in runs), strict=True)]
        moved: dict[str, float] = {}
        for one in runs:
            for kind, size in one.tier_bytes:
                moved[kind] = moved.get(kind, 0.0) + size / len(runs) / 1e9
        tiers = ", ".join(f"{kind} {size:.0f}" for kind, size in sorted(moved.items()))
        texts = [f"{value:.3f}" for value in mean[:5]]
        shown.add_row(name, *texts, f"{mean[5] * 1e3:.1f}", f"{mean[6]:.3f}", f"{mean[7]:.3f}", f"{mean[8]:.0f}", tiers)
    return shown


def astuple(run: Outcome) -> tuple[float, ...]:
    return (
        *(run.ttft_s, run.ttft_p50_s, run.ttft_p99_s, run.second_s, run.second_p99_s),
        *(run.itl_s, run.goodput, run.hits, run.errors),
    )


def verdicts(cell: Cell, outcomes: dict[str, list[Outcome]]) -> Iterator[Row]:
    """Ours against the best baseline of this cell, by mean TTFT and by goodput; and against NetKV where KV is felt."""
    ours = outcomes.get(OURS)
    others = {name: runs for name, runs in outcomes.items() if name != OURS}
    if ours is None or not others:
        return
    for what, field, sign in (("mean TTFT", "ttft_s", 1), ("goodput", "goodput", -1)):
        best = min(others, key=lambda name: sign * mean_of(others[name], field))
        differences = [getattr(a, field) - getattr(b, field) for a, b in zip(ours, others[best], strict=True)]
        noise = 2 * float(np.std(differences, ddof=1)) / math.sqrt(len(ours)) if len(ours) > 1 else 0.0
        reference = mean_of(others[best], field)
        aim = (reference + sign * noise) / reference
        unit = "s" if sign > 0 else "requests/s"
        yield Row(f"{cell.name}: {what}", mean_of(ours, field), unit, best, reference, aim, more_is_better=sign < 0)
    if cell.is_felt and "netkv" in others:
        wait, scarce = mean_of(others["netkv"], "second_s"), scarcest(outcomes)
        yield Row(f"{cell.name}: wait for the second token", mean_of(ours, "second_s"), "s", "netkv", wait, 0.7)
        sizes = [sum(dict(run.tier_bytes).get(scarce, 0.0) for run in runs) for runs in (ours, others["netkv"])]
        yield Row(f"{cell.name}: bytes over {scarce}", sizes[0] / 1e9, "GB", "netkv", sizes[1] / 1e9, 0.5)


def ablations(cell: Cell, outcomes: dict[str, list[Outcome]]) -> Iterator[Row]:
    """Prices that lack a term, against the whole price."""
    for name, runs in outcomes.items():
        if name != OURS:
            for what, field, unit in (("mean TTFT", "ttft_s", "s"), ("goodput", "goodput", "requests/s")):
                whole = mean_of(outcomes[OURS], field)
                yield Row(f"{cell.name}, {name}: {what}", mean_of(runs, field), unit, OURS, whole)


TIERS = ("nvlink", "node", "rack", "pod", "cluster")


def scarcest(outcomes: dict[str, list[Outcome]]) -> str:
    crossed = {kind for runs in outcomes.values() for run in runs for kind, _ in run.tier_bytes}
    known = [kind for kind in TIERS if kind in crossed]
    return known[-1] if known else next(iter(sorted(crossed)), "")


def mean_of(runs: Sequence[Outcome], field: str) -> float:
    return float(np.mean([getattr(run, field) for run in runs]))


if __name__ == "__main__":
    main()
