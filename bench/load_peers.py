"""`penstock bench` beside aiperf: the same load on the same server, in turns, and what each says of it.

The server is `penstock serve` with the simulated engine, one event per token. aiperf lives in an environment of its
own, and --aiperf names its command; without it there is nothing to compare with. Values are medians over rounds;
"spread" is the widest difference between rounds, of the median, and tells what two tools may differ by.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from report import Row, emit

import penstock

MODEL = Path(penstock.__file__).parent / "models" / "demo"
ENGINE = {"step_s": 0.025, "most_steps": 1, "first_token": 300}  # 25 ms a step, each of them sent by itself
ISL, OSL = 512, 64
Figures = dict[str, float]  # by name, in units that are in the name


@dataclass(frozen=True, slots=True)
class Case:
    """One load, in the words of both."""

    name: str
    requests: int
    own: tuple[str, ...]
    aiperf: tuple[str, ...]


CASES = (
    Case("8 at a time", 48, ("--concurrency", "8"), ("--concurrency", "8")),
    Case(
        *("3 a second, evenly", 36, ("--rate", "3", "--arrivals", "constant")),
        ("--request-rate", "3", "--arrival-pattern", "constant"),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="one round of one case")
    parser.add_argument("--aiperf", default=shutil.which("aiperf"), help="its command; by default where PATH has it")
    arguments = parser.parse_args()
    if arguments.aiperf is None:
        print("skipped: aiperf is not installed; name its command with --aiperf", file=sys.stderr)
        return
    rounds, cases = (1, CASES[:1]) if arguments.quick else (3, CASES)
    with serving() as url:
        ask_penstock(url, CASES[0], seed=0)  # the first requests of a server are slow
        rows = [row for case in cases for row in compare(url, case, rounds, arguments.aiperf)]
    emit(rows, arguments.json)


def compare(url: str, case: Case, rounds: int, aiperf: str) -> Iterator[Row]:
    own: list[Figures] = []
    peer: list[Figures] = []
    for seed in range(1, rounds + 1):
        own.append(ask_penstock(url, case, seed))
        peer.append(ask_aiperf(aiperf, url, case, seed))
    for name in own[0]:
        what, unit = name.rsplit(", ", 1)
        ours, theirs = ([figures[name] for figures in each] for each in (own, peer))
        label = f"{case.name}: {what}"
        yield Row(label, statistics.median(ours), unit, "aiperf", statistics.median(theirs))
        if rounds > 1:
            yield Row(f"{label}, spread", spread(ours) * 100, "%", "aiperf", spread(theirs) * 100)


def spread(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)


@contextmanager
def serving() -> Iterator[str]:
    """One prefill and one decode worker; yields the server's address."""
    options = [f"--engine-option.{name}={value}" for name, value in ENGINE.items()]
    command = [sys.executable, "-m", "penstock", "serve", "--port=0", "--json", "--no-ask", "--engine=simulated"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield next(event["url"] for event in map(json.loads, process.stdout) if event["event"] == "ready")
        finally:
            process.terminate()


def ask_penstock(url: str, case: Case, seed: int) -> Figures:
    command = [sys.executable, "-m", "penstock", "bench", url, *case.own, f"--isl={ISL}", f"--osl={OSL}"]
    before_s = children_cpu_s()
    done = subprocess.run(
        [*command, f"--requests={case.requests}", f"--seed={seed}", "--warmup=0", "--json=-"],
        check=True,
        capture_output=True,
        text=True,
    )
    (told,) = json.loads(done.stdout)["reports"]
    if told["errors"]:
        raise SystemExit(f"{case.name}: {told['errors']}")
    rates, latencies = told["throughput"], told["latencies"]
    return {
        "requests, /s": rates["requests_per_s"],
        "tokens out, /s": rates["output_tokens_per_s"],
        **times("TTFT", latencies["ttft"], 1e3),
        **times("TPOT", latencies["tpot"], 1e3),
        **times("end to end", latencies["end_to_end"], 1e3),
        "CPU of the generator, s": children_cpu_s() - before_s,
    }


def ask_aiperf(aiperf: str, url: str, case: Case, seed: int) -> Figures:
    """What it calls inter-token latency is TPOT."""
    command = [aiperf, "profile", "-m", "demo", "--url", url, "--endpoint-type", "completions", "--streaming"]
    command += [f"--tokenizer={MODEL}", f"--isl={ISL}", f"--osl={OSL}", "--use-server-token-count", *case.aiperf]
    command += ["--extra-inputs=ignore_eos:true", "--extra-inputs=temperature:0", "--ui=none"]
    before_s = children_cpu_s()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*command, "--request-count", str(case.requests), "--random-seed", str(seed), "--artifact-dir", folder],
            check=True,
            capture_output=True,
        )
        told = json.loads((Path(folder) / "profile_export_aiperf.json").read_text())
    return {
        "requests, /s": told["request_throughput"]["avg"],
        "tokens out, /s": told["output_token_throughput"]["avg"],
        **times("TTFT", told["time_to_first_token"]),
        **times("TPOT", told["inter_token_latency"]),
        **times("end to end", told["request_latency"]),
        "CPU of the generator, s": children_cpu_s() - before_s,
    }


def times(name: str, found: Mapping[str, float], factor: float = 1.0) -> Figures:
    """Mean and percentiles in milliseconds."""
    mean = found["mean"] if "mean" in found else found["avg"]
    return {f"{name} mean, ms": mean * factor} | {f"{name} {part}, ms": found[part] * factor for part in ("p50", "p90")}


def children_cpu_s() -> float:
    """Of processes that have ended and were waited for, theirs among them: not of the server, which runs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
