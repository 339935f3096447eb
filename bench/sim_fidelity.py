"""How true the simulator is: models served for real on this machine, and the same traffic on virtual time.

Two workers with one engine thread each, aggregated (both do both) and disaggregated (one prefills in the other's
memory); this process is their frontend. The real workers first answer traffic at three rates, from which they learn
what their steps take, and this process how long a message is under way. With that alone the simulator plays
other rates, and a burst that saturates. Rates are shares of what the simulator thinks saturates the workers after a
warm-up. In each row the value is simulated and the reference real; an error is the distance of their ratio from one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import statistics
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from report import Row, emit

from penstock import clock, plugin
from penstock.cluster import Role, Standing
from penstock.discovery.memory import MemoryDiscovery
from penstock.errors import BadRequest
from penstock.launch.api import Job
from penstock.launch.local import LocalLauncher
from penstock.policy.batching import Limits
from penstock.policy.latency.fit import believe
from penstock.policy.latency.steps import StepModel, chunk, decode
from penstock.request import Request, Sampling
from penstock.serve.registry import Registry
from penstock.serve.router import Router
from penstock.serve.rpc import Endpoint
from penstock.sim.cluster import ClusterSpec, WorkerSpec
from penstock.sim.record import Recorder
from penstock.sim.simulation import simulate
from penstock.tokens import count, pack
from penstock.topology.build import PRESETS, build
from penstock.wire.stream import StreamWire
from penstock.workloads.generated import Poisson, Shape, Spread, generated
from penstock.workloads.workload import Session, Turn, Workload, play

DEMO = Path(__file__).parents[1] / "penstock" / "models" / "demo"
LEARNED_AT = (0.35, 0.7, 1.3)  # of saturation; beyond it for the sake of large batches
JUDGED_AT = (0.2, 0.5, 0.85)
PING_S = 0.05
REPORT_S = 0.5
DEADLINE_S = 120.0
BATCH = 16
QUEUED = 240  # requests at once: workers refuse more than 256 in a queue
MOST = 1_000_000
SLACK = (1e-6, 1e-9, 1e-12, 1e-9, 1e-12)  # so that a price which was learned to be 0 can be believed
MODES: dict[str, tuple[str, tuple[Role, Role]]] = {
    "aggregated": ("least_loaded", ("any", "any")),
    "disaggregated": ("p_token", ("prefill", "decode")),
}


@dataclass(frozen=True, slots=True)
class Served:
    """A model, and what is asked of it."""

    name: str
    folder: str
    traffic: Shape


@dataclass(frozen=True, slots=True)
class Seen:
    """What clients saw of one run; times in seconds."""

    ttft: tuple[float, float]  # mean, 90th percentile
    itl: tuple[float, float]
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """Real traffic that is to be played again."""

    name: str
    workload: Workload
    real: Seen


@dataclass(frozen=True, slots=True)
class Measured:
    """What was learned of real workers, and the runs to judge by: the last one is the burst."""

    cluster: ClusterSpec
    policy: str
    runs: tuple[Run, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="the bundled model alone, for 3 s a run")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        models = [Served("2 M", str(DEMO), Shape(Spread(150, 0.8), Spread(40, 0.8)))]
        if not arguments.quick:
            models.append(Served("22 M", made(folder), Shape(Spread(400, 0.8), Spread(64, 0.8))))
        for served in models:
            for mode in MODES:
                measured = asyncio.run(measure(served, mode, 3.0 if arguments.quick else 12.0))
                rows += judged(f"{served.name}, {mode}", measured)
    emit(rows, arguments.json)


def made(folder: str) -> str:
    """A Llama of 22 M parameters with random weights, as in bench/engine.py."""
    import torch
    from engine import CONFIG
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder)
    return folder


# For real


async def measure(served: Served, mode: str, seconds: float) -> Measured:
    policy, roles = MODES[mode]
    async with serving(served, policy, roles) as fleet:
        await fleet.play(traffic(served, 2.0, 1, seconds))
        full = saturation_rate(served, await fleet.learned())
        trips: list[float] = []
        pinging = asyncio.ensure_future(fleet.ping(trips))
        for seed, share in enumerate(LEARNED_AT, start=10):
            await fleet.play(traffic(served, share * full, seed, seconds).limited(QUEUED if share > 1 else MOST))
        pinging.cancel()
        await asyncio.wait([pinging])
        cluster = described(served, await fleet.learned(), statistics.median(trips) / 2)
        runs = []
        for seed, share in enumerate(JUDGED_AT, start=20):
            workload = traffic(served, share * full, seed, seconds)
            runs.append(Run(f"at {share:.2f}", workload, await fleet.play(workload)))
        burst = traffic(served, 1e5, 30, seconds=1.0).limited(QUEUED)
        runs.append(Run("burst", burst, await fleet.play(burst)))
    return Measured(cluster, policy, tuple(runs))


@dataclass(slots=True)
class Fleet:
    """Real workers, asked from this process."""

    router: Router
    endpoint: Endpoint
    model: str
    asked: int = 0

    async def play(self, workload: Workload) -> Seen:
        recorder = Recorder()
        begun_s = clock.now()

        async def ask(session: Session, turn: Turn, prompt: bytes) -> bytes | None:
            row = recorder.begin(clock.now() - begun_s, count(prompt))
            self.asked += 1
            sampling = Sampling(turn.output_tokens, temperature=0, ignore_eos=True)
            finish = None
            async with self.router.generate(Request(f"r{self.asked}", self.model, prompt, sampling)) as stream:
                while finish is None:
                    fresh, finish = await stream.read()
                    recorder.tokens(row, clock.now() - begun_s, len(fresh), stream.over_s)
            recorder.end(row, clock.now() - begun_s, stream.timeline, "")
            return pack([1]) * turn.output_tokens

        await play(workload, ask)
        return seen(recorder)

    async def learned(self) -> Mapping[str, Standing]:
        """What workers report, once they had time to."""
        await asyncio.sleep(2 * REPORT_S)
        return dict(self.router.standings())

    async def ping(self, trips: list[float]) -> None:
        """Notes how long it takes to hear that a worker knows no method of that name."""
        while True:
            for standing in list(self.router.standings().values()):
                peer = await self.endpoint.peer(standing.member.addresses)
                begun_s = clock.now()
                try:
                    async with peer.call("ping", None) as call:
                        await call.receive(bytes)
                except BadRequest:
                    trips.append(clock.now() - begun_s)
            await asyncio.sleep(PING_S)


@asynccontextmanager
async def serving(served: Served, policy: str, roles: tuple[Role, Role]) -> AsyncIterator[Fleet]:
    """Starts both workers; this process is their frontend."""
    token = secrets.token_hex(8)
    discovery = MemoryDiscovery()
    endpoint = Endpoint({"tcp": (wire := StreamWire()), "unix": wire}, token, {"join": Registry(discovery).join})
    route = plugin.find("policy.routing", policy).ROUTING
    async with (
        endpoint,
        endpoint.listen("tcp:127.0.0.1:0") as bound,
        LocalLauncher(os.environ) as launcher,
        Router(discovery, endpoint, Random(0), route) as router,
    ):
        for number, role in enumerate(roles):
            flags = {"name": f"{role}-{number}", "role": role, "model-name": served.name, "threads": 1, "kv-gib": 1}
            flags |= {"join": bound.removeprefix("tcp:"), "device": "cpu", "dtype": "float32"}
            arguments = ["worker", served.folder, *(f"--{flag}={value}" for flag, value in flags.items())]
            await launcher.start(Job(f"{role}-{number}", arguments, {"PENSTOCK_TOKEN": token}))
        async with asyncio.timeout(DEADLINE_S):
            await router.wait_ready(len(roles))
        yield Fleet(router, endpoint, served.name)


def traffic(served: Served, rate: float, seed: int, seconds: float) -> Workload:
    return generated(Poisson(rate), served.traffic, seed).until(seconds)


def saturation_rate(served: Served, standings: Mapping[str, Standing]) -> float:
    """Requests per second that should saturate these workers, a batch of 16 decoding."""
    prompt, output = served.traffic.first_tokens.mean, served.traffic.output_tokens.mean
    prefill_s, decode_s = [], []
    for standing in standings.values():
        model = believed(standing)
        prefill_s.append(model.seconds(chunk(round(prompt))))
        decode_s.append(output * model.seconds(decode(BATCH, BATCH * (prompt + output / 2))) / BATCH)
    roles = [standing.member.role for standing in standings.values()]
    if "prefill" in roles:
        return 1 / max(prefill_s[roles.index("prefill")], decode_s[roles.index("decode")])
    return sum(1 / sum(parts) for parts in zip(prefill_s, decode_s, strict=True))


def believed(standing: Standing) -> StepModel:
    if (prices := standing.load.step_prices) is None:
        raise SystemExit(f"{standing.member.worker} has not learned what its steps take")
    return StepModel.of(prices)


# Simulated


def described(served: Served, standings: Mapping[str, Standing], message_s: float) -> ClusterSpec:
    """A cluster of workers that are as these say they are."""
    limits = Limits()
    workers = []
    for name, standing in standings.items():
        member, learned = standing.member, believed(standing)
        known = StepModel(
            believe(learned.line.prices, doubt=0.1, slack=SLACK), learned.free_tokens, learned.expert_share
        )
        places = ("node0/cpu0",)
        workers.append(
            WorkerSpec(name, member.role, places, known, member.blocks, limits.step_tokens, limits.max_running)
        )
    member = next(iter(standings.values())).member
    return ClusterSpec(
        name="here",
        fabric=build([PRESETS["tcp-host"]]),
        model=served.name,
        layout=member.layout,
        max_context_tokens=member.max_context_tokens,
        workers=tuple(workers),
        message_s=message_s,
        in_place=True,
    )


def judged(name: str, measured: Measured) -> list[Row]:
    rows = [Row(f"{name}: one way of a message", measured.cluster.message_s * 1e3, "ms")]
    for run in measured.runs:
        recorder = Recorder()
        simulate(measured.cluster, run.workload, measured.policy, 0, recorder)
        simulated, real = seen(recorder), run.real
        if run is measured.runs[-1]:
            rows += compared(
                f"{name}, {run.name}: throughput", simulated.tokens_per_s, real.tokens_per_s, "tokens/s", 0.1
            )
            continue
        for what, here, there in (("TTFT", simulated.ttft, real.ttft), ("ITL", simulated.itl, real.itl)):
            label = f"{name}, {run.name}: {what}"
            rows += compared(f"{label} mean", here[0] * 1e3, there[0] * 1e3, "ms", 0.1)
            rows += compared(f"{label} p90", here[1] * 1e3, there[1] * 1e3, "ms", 0.2)
    return rows


def compared(name: str, simulated: float, real: float, unit: str, aim: float) -> list[Row]:
    return [
        Row(name, simulated, unit, "real", real),
        Row("   off by", abs(simulated / real - 1), "of it", aim=aim),
    ]


def seen(recorder: Recorder) -> Seen:
    requests = recorder.requests()
    ttft = requests.first_s - requests.begun_s
    return Seen(
        (float(ttft.mean()), float(np.quantile(ttft, 0.9))),
        (recorder.gaps.total / recorder.gaps.count, recorder.gaps.at(0.9)),
        float(requests.output_tokens.sum() / (requests.last_s.max() - requests.begun_s.min())),
    )


if __name__ == "__main__":
    main()
