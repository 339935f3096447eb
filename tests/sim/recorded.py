"""Simulations that never were: what a Recorder would have been told of one, made up from a seed."""

from __future__ import annotations

from random import Random

from penstock.request import Timeline
from penstock.sim.record import LinkSample, Recorder, WorkerSample
from penstock.sim.report import Cell, Report, Slo, summarize

SLO = Slo(ttft_s=1.0, itl_s=0.02)


def cell(policy: str = "pairs", rate: float = 1.0, split: str = "2:2") -> Cell:
    return Cell("one-node", "mooncake-like", policy, rate, split, gpus=8, seed=1)


def recorded(seed: int, requests: int = 200, load: float = 0.5, workers: int = 4) -> Recorder:
    """Requests about 0.1 s apart, slower with more `load`, on workers that are sampled as time goes by."""
    rng = Random(seed)
    recorder = Recorder()
    at_s = 0.0
    for number in range(requests):
        at_s += rng.expovariate(10)
        while at_s >= recorder.next_sample_s:
            _sample(recorder, rng, load, workers)
        _request(recorder, rng, at_s, number, load)
    return recorder


def report(policy: str = "pairs", rate: float = 1.0, split: str = "2:2", load: float = 0.5) -> Report:
    return summarize(recorded(7, load=load), cell(policy, rate, split), SLO)


def _request(recorder: Recorder, rng: Random, at_s: float, number: int, load: float) -> None:
    row = recorder.begin(at_s, prompt_tokens=1000)
    ttft_s = rng.lognormvariate(-1, 0.3 + load)
    if rng.random() < 0.02 * load:
        recorder.end(row, at_s + ttft_s, None, "Overloaded")
        return
    recorder.tokens(row, at_s + ttft_s, 1, 0.0)
    recorder.tokens(row, at_s + ttft_s + 0.03, 1, 0.0)
    ended_s = at_s + ttft_s + 0.03
    for _ in range(rng.randrange(1, 6)):
        over_s = 9 * rng.lognormvariate(-4.3, 0.2 * load)
        recorder.tokens(row, ended_s + 0.02 + over_s, 10, over_s)
        ended_s += 0.02 + over_s
    timeline = Timeline(
        decode_worker=f"decode-{number % 2}",
        prefill_worker=f"prefill-{number % 2}",
        prompt_tokens=1000,
        cached_tokens=rng.randrange(0, 500),
        computed_tokens=700,
        moved_tokens=700,
        copied_bytes=700_000,
        prefill_attempts=1,
        prefill_started_s=ttft_s / 2,
    )
    recorder.end(row, ended_s, timeline, "")


def _sample(recorder: Recorder, rng: Random, load: float, workers: int) -> None:
    names = [f"{role}-{index}" for index in range(workers // 2) for role in ("prefill", "decode")]
    links = [f"nic{index} -> leaf0" for index in range(12)]
    recorder.sample(
        recorder.next_sample_s,
        [(name, _worker(rng, load)) for name in names],
        [(name, LinkSample(min(1.0, rng.random() * load / (1 + index)))) for index, name in enumerate(links)],
    )


def _worker(rng: Random, load: float) -> WorkerSample:
    return WorkerSample(
        running=int(20 * load * rng.random()),
        waiting=int(5 * load * rng.random()),
        queued_tokens=int(20_000 * load * rng.random()),
        busy=min(1.0, load * (0.6 + 0.8 * rng.random())),
        used=load * rng.random(),
    )
