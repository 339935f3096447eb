"""A cluster that does not exist, as a whole: nothing is lost in it, and one seed is one history."""

from __future__ import annotations

import os
import subprocess
import sys
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import SetupError
from penstock.sim.cluster import ClusterSpec
from penstock.sim.cluster_file import described
from penstock.sim.record import Recorder, Requests
from penstock.sim.simulation import Fault, simulate
from penstock.workloads.generated import Poisson, Shape, Spread, generated
from penstock.workloads.workload import Workload

CLUSTER = """
topology: hgx-h100
model: llama-3-8b
workers:
  - {role: prefill, count: %d}
  - {role: decode, count: %d, kv_gib: %s}
"""


def cluster(prefill: int = 2, decode: int = 2, kv_gib: float = 40) -> ClusterSpec:
    return described(CLUSTER % (prefill, decode, kv_gib), "a test's cluster")


def talk(requests: int, seed: int, rate: float = 8.0) -> Workload:
    shape = Shape(first_tokens=Spread(3_000, 2.0), output_tokens=Spread(100, 1.5))
    return generated(Poisson(rate), shape, seed).limited(requests)


def played(
    spec: ClusterSpec, workload: Workload, policy: str, seed: int = 0, faults: tuple[Fault, ...] = ()
) -> Recorder:
    recorder = Recorder()
    simulate(spec, workload, policy, seed, recorder, faults=faults)
    return recorder


def asked(workload: Workload) -> list[int]:
    """Output tokens that each request asks for, in order of arrival."""
    return [turn.output_tokens for session in workload for turn in session.turns]


def errors(recorder: Recorder) -> list[str]:
    return [recorder.error_kinds[number] for number in recorder.requests().error]


def test_every_request_is_answered_in_full_and_moves_the_bytes_it_says() -> None:
    spec, workload = cluster(), talk(60, seed=1)
    requests = played(spec, workload, "p_token").requests()
    assert requests.output_tokens.tolist() == asked(workload)
    assert (requests.ended_s >= requests.last_s).all()
    assert ((requests.first_s - requests.begun_s) > 0).all()
    layout = spec.layout
    blocks = -(-requests.prompt_tokens // layout.block_tokens)
    assert (requests.copied_bytes <= blocks * layout.block_bytes).all()
    assert ((requests.copied_bytes > 0) == (requests.moved_tokens > 0)).all()
    assert requests.copied_bytes.sum() > 0
    assert (requests.cached_tokens + requests.computed_tokens == requests.prompt_tokens).all()


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["round_robin", "p_token", "pairs", "netkv", "power_of_two"]),
)
def test_nothing_is_lost_whatever_breaks(seed: int, prefill: int, decode: int, policy: str) -> None:
    """Every request ends whole or with an error; `simulate` itself checks that every block is free at the end."""
    spec, workload = cluster(prefill, decode, kv_gib=2), talk(40, seed)
    recorder = played(spec, workload, policy, seed, misfortunes(Random(seed), spec))
    requests = recorder.requests()
    room = np.maximum(0, spec.max_context_tokens - requests.prompt_tokens)
    wanted = np.minimum(asked(workload), room)
    whole = np.array([not error for error in errors(recorder)])
    assert len(requests.begun_s) == len(wanted)
    assert not np.isnan(requests.ended_s).any()
    assert (requests.output_tokens[whole] == wanted[whole]).all()
    assert (requests.output_tokens <= wanted).all()


def misfortunes(rng: Random, spec: ClusterSpec) -> tuple[Fault, ...]:
    """Workers die and come back, or stand still for a while."""
    faults: list[Fault] = []
    for worker in spec.workers:
        at_s = rng.uniform(0, 6)
        for verb, after_s in rng.choice([(), (("crash", 0), ("start", 2)), (("freeze", 0), ("thaw", 4))]):
            faults.append(Fault(at_s + after_s, verb, worker.name))
    return tuple(faults)


def test_clocks_that_differ_change_nothing() -> None:
    workload = talk(30, seed=3)
    skews_s = {"prefill-0": 3_600.0, "decode-0": -0.5, "decode-1": 7.0}
    true, skewed = Recorder(), Recorder()
    simulate(cluster(), workload, "p_token", 0, true)
    simulate(cluster(), workload, "p_token", 0, skewed, skews_s=skews_s)
    assert close(true.requests(), skewed.requests())


def close(one: Requests, other: Requests) -> bool:
    """But for rounding: an hour more costs times a few bits."""
    columns = Requests.__slots__
    return all(np.allclose(getattr(one, c), getattr(other, c), rtol=0, atol=1e-9, equal_nan=True) for c in columns)


def test_one_seed_is_one_history_whatever_python_hashes() -> None:
    """Two processes with different hash seeds."""
    source = (
        "from tests.sim.test_simulation import *; import hashlib;"
        "faults = misfortunes(Random(5), cluster());"
        "r = played(cluster(), talk(50, 2), 'pairs', 7, faults).requests();"
        "print(hashlib.sha256(b''.join(getattr(r, c).tobytes() for c in Requests.__slots__)).hexdigest())"
    )
    outputs = []
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True
        )
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] and len(outputs[0]) == 65


def test_a_worker_may_start_at_the_moment_of_a_sample() -> None:
    died_and_back = Fault(0.3, "crash", "decode-0"), Fault(1.0, "start", "decode-0")
    assert not any(errors(played(cluster(), talk(20, 1), "p_token", faults=died_and_back)))


def test_a_fault_must_fit() -> None:
    with pytest.raises(SetupError, match="no link"):
        played(cluster(), talk(5, 1), "p_token", faults=(Fault(0.1, "cut", "the moon"),))
