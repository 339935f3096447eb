"""Every policy: what it may choose, that it is pure, and that it computes the formula that it names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from penstock import plugin
from penstock.policy.routing.api import HANDOVER_S, Choice, Fleet, Route
from penstock.policy.routing.roster import PRIOR_STEP_S
from penstock.policy.routing.ways import Rung
from tests.policy.routing.fleets import LAYOUT, Rows, Worker, ask_of, fleet_of, some_workers

NAMES = plugin.names("policy.routing")
every_policy = pytest.mark.parametrize("name", NAMES)
prompts = st.integers(1, 10_000)


def policy(name: str) -> Route:
    route: Route = plugin.find("policy.routing", name).ROUTING
    return route


def choose(name: str, workers: Sequence[Worker], prompt_tokens: int, seed: int = 1, number: int = 0) -> Choice:
    fleet = fleet_of(workers, Rows())
    return policy(name)(0.0, ask_of(workers, prompt_tokens, number=number), fleet, Random(seed))


def reaches(prefill: Worker, decode: Worker) -> bool:
    same_memory = prefill.memory != "" and prefill.memory == decode.memory
    return prefill is decode or same_memory or (prefill.domain != "" and prefill.domain == decode.domain)


def decoders_of(workers: Sequence[Worker]) -> list[Worker]:
    return [worker for worker in workers if worker.role != "prefill"] or list(workers)


def prefillers_of(workers: Sequence[Worker]) -> list[Worker]:
    preferring = [worker for worker in workers if worker.role != "decode"] or list(workers)
    return [worker for worker in preferring if any(reaches(worker, decode) for decode in decoders_of(workers))]


def test_all_policies_are_found() -> None:
    assert set(NAMES) == {
        *("round_robin", "random", "least_loaded", "power_of_two", "prefix_affinity"),
        *("p_token", "lmetric", "dynamo", "netkv", "pairs"),
    }


@every_policy
@given(workers=some_workers(), prompt=prompts, seed=st.integers(0, 2**32), number=st.integers(0, 1_000))
def test_a_choice_is_admissible(name: str, workers: list[Worker], prompt: int, seed: int, number: int) -> None:
    choice = choose(name, workers, prompt, seed, number)
    by_name = {worker.name: worker for worker in workers}
    decode, prefill = by_name[choice.decode], [by_name[worker] for worker in choice.prefill]
    assert decode in decoders_of(workers)
    assert all(worker in prefillers_of(workers) and reaches(worker, decode) for worker in prefill)
    assert decode not in prefill
    assert len(set(choice.prefill)) == len(choice.prefill) <= 3
    assert choice.why.startswith(name)
    assert choice.wait_s == 0 or name == "pairs"


@every_policy
@given(workers=some_workers(), prompt=prompts, seed=st.integers(0, 2**32), number=st.integers(0, 1_000))
def test_a_policy_is_pure(name: str, workers: list[Worker], prompt: int, seed: int, number: int) -> None:
    fleet, ask = fleet_of(workers, Rows()), ask_of(workers, prompt, number=number)
    columns = [column.copy() for column in _columns(fleet)]
    first, again = (policy(name)(0.0, ask, fleet, Random(seed)) for _ in range(2))
    assert first == again == choose(name, workers, prompt, seed, number)
    assert all(np.array_equal(before, now) for before, now in zip(columns, _columns(fleet), strict=True))


def _columns(fleet: Fleet) -> list[np.ndarray]:  # type: ignore[type-arg]
    return [fleet.queued_tokens, fleet.prefills, fleet.streams, fleet.used_blocks, fleet.decode_step_s]


@every_policy
def test_equals_are_spread(name: str) -> None:
    alike = [Worker(f"w{number}") for number in range(4)]
    fleet, rng = fleet_of(alike), Random(1)
    choices = [policy(name)(0.0, ask_of(alike, 100, number=number), fleet, rng) for number in range(80)]
    assert {choice.decode for choice in choices} == {"w0", "w1", "w2", "w3"}


@every_policy
def test_workers_that_reach_nobody_leave_the_decoders_to_themselves(name: str) -> None:
    workers = [Worker("p", "prefill", memory="elsewhere"), Worker("d", "decode")]
    choice = choose(name, workers, 2_000)
    assert (choice.decode, choice.prefill) == ("d", ())


@every_policy
def test_a_pool_that_is_split_hands_over(name: str) -> None:
    workers = [Worker("p", "prefill"), Worker("q", "prefill"), Worker("d", "decode")]
    choice = choose(name, workers, 5_000)
    assert (choice.decode, set(choice.prefill)) == ("d", {"p", "q"})


# Formulas, as plain loops over workers

Price = Callable[[Worker], float]


def _uncached(prompt: int) -> Price:
    return lambda worker: prompt - min(worker.cached, prompt - 1)


def _tokens(prompt: int) -> Price:
    return lambda worker: worker.queued + _uncached(prompt)(worker)


def _affinity(prompt: int, load: Price, among: Sequence[Worker]) -> Price:
    loads = [load(worker) for worker in among]
    if max(loads) - min(loads) > 64 and max(loads) > 1.5 * min(loads):
        return load
    held = [min(worker.cached, prompt - 1) for worker in among]
    common = min(held) if len(held) > 1 else 0
    if max(held) - common > 0.3 * (prompt - common):
        return _uncached(prompt)
    return lambda worker: worker.used_blocks


def _streams(worker: Worker) -> float:
    return worker.running


def _waiting(worker: Worker) -> float:
    return worker.waiting


def _used(worker: Worker) -> float:
    return worker.used_blocks


# By policy: (prompt, workers to choose from) -> price of doing it all; of prefill; price of decode
ALONE: dict[str, Callable[[int, Sequence[Worker]], Price]] = {
    "least_loaded": lambda prompt, among: _streams,
    "p_token": lambda prompt, among: _tokens(prompt),
    "netkv": lambda prompt, among: _tokens(prompt),
    "lmetric": lambda prompt, among: lambda worker: _tokens(prompt)(worker) * (worker.running + 1),
    "dynamo": lambda prompt, among: lambda worker: _tokens(prompt)(worker) / LAYOUT.block_tokens + worker.used_blocks,
    "prefix_affinity": lambda prompt, among: _affinity(prompt, _streams, among),
}
PREFILL: dict[str, Callable[[int, Sequence[Worker]], Price]] = {
    "least_loaded": lambda prompt, among: _waiting,
    "p_token": lambda prompt, among: _tokens(prompt),
    "netkv": lambda prompt, among: _tokens(prompt),
    "lmetric": lambda prompt, among: _tokens(prompt),
    "dynamo": lambda prompt, among: _tokens(prompt),
    "prefix_affinity": lambda prompt, among: _affinity(prompt, _waiting, among),
}
DECODE: dict[str, Price] = {
    "least_loaded": _streams,
    "p_token": _streams,
    "lmetric": _streams,
    "dynamo": _used,
    "prefix_affinity": _streams,
}


@pytest.mark.parametrize("name", sorted(ALONE))
@given(workers=some_workers(roles=["any"]), prompt=prompts)
def test_one_worker_is_chosen_by_the_formula(name: str, workers: list[Worker], prompt: int) -> None:
    choice = choose(name, workers, prompt)
    price = ALONE[name](prompt, workers)
    assert choice.prefill == ()
    assert choice.decode in {worker.name for worker in workers if price(worker) == min(map(price, workers))}


@pytest.mark.parametrize("name", sorted(PREFILL))
@given(workers=some_workers(roles=["prefill", "decode"]), prompt=prompts)
def test_two_workers_are_chosen_by_the_formula(name: str, workers: list[Worker], prompt: int) -> None:
    assume({worker.role for worker in workers} == {"prefill", "decode"} and prefillers_of(workers))
    choice = choose(name, workers, prompt)
    prefillers = prefillers_of(workers)
    price = PREFILL[name](prompt, prefillers)
    chosen = next(worker for worker in workers if worker.name == choice.prefill[0])
    assert price(chosen) == min(map(price, prefillers))
    if name != "netkv":
        reached = [worker for worker in decoders_of(workers) if reaches(chosen, worker)]
        decode = next(worker for worker in reached if worker.name == choice.decode)
        assert DECODE[name](decode) == min(map(DECODE[name], reached))


@given(workers=some_workers(roles=["prefill", "decode"]), prompt=prompts)
def test_netkv_prices_load_cache_and_way(workers: list[Worker], prompt: int) -> None:
    workers = [replace(worker, memory="", domain="net", step_s=0.0) for worker in workers]
    assume({worker.role for worker in workers} == {"prefill", "decode"})
    choice = choose("netkv", workers, prompt)
    by_name = {worker.name: worker for worker in workers}
    prefill = by_name[choice.prefill[0]]

    def seconds(decode: Worker) -> float:
        start_s, byte_s = way(prefill.name, decode.name)
        moved = _uncached(prompt)(decode) * LAYOUT.token_bytes
        return 100 / 32 * PRIOR_STEP_S * decode.running + HANDOVER_S + start_s + byte_s * moved

    assert seconds(by_name[choice.decode]) == pytest.approx(min(map(seconds, decoders_of(workers))))


def way(source: str, target: str) -> tuple[float, float]:
    """Seconds to start and per byte, over idle links."""
    ups, downs = Rows().climb(source), Rows().climb(target)
    level = next(level for level in range(2) if ups[level].domain == downs[level].domain)
    byte_s = max(max(ups[i].up_s, downs[i].down_s) for i in range(level + 1))
    return ups[level].latency_s + downs[level].latency_s, byte_s


def test_netkv_avoids_who_already_receives() -> None:
    workers = [Worker("p", "prefill", "", "net"), *(Worker(name, "decode", "", "net") for name in ("d", "e"))]

    class Even:
        def climb(self, device: str) -> Sequence[Rung]:
            return [Rung("hall", 1e-9, 1e-9, 0.0, device, device)]

    fleet = fleet_of(workers, Even())
    fleet.incoming_bytes[fleet.names.index("d")] = 1e9
    choices = [policy("netkv")(0.0, ask_of(workers, 1_000), fleet, Random(seed)).decode for seed in range(20)]
    assert set(choices) == {"e"}


def test_round_robin_goes_round_and_lets_all_meet() -> None:
    workers = [*(Worker(f"p{i}", "prefill") for i in range(3)), *(Worker(f"d{i}", "decode") for i in range(3))]
    choices = [choose("round_robin", workers, 100, number=number) for number in range(9)]
    assert [choice.prefill[0] for choice in choices] == ["p0", "p1", "p2"] * 3
    assert {(choice.prefill[0], choice.decode) for choice in choices} == {
        (f"p{i}", f"d{j}") for i in range(3) for j in range(3)
    }


def test_power_of_two_never_takes_the_worst() -> None:
    workers = [Worker(f"w{load}", running=load) for load in range(4)]
    chosen = {choose("power_of_two", workers, 100, seed).decode for seed in range(60)}
    assert chosen == {"w0", "w1", "w2"}


def test_what_every_worker_holds_attracts_nobody() -> None:
    first, second = Worker("first", cached=900, used_blocks=100), Worker("second", cached=900)
    assert choose("prefix_affinity", [first, second], 1_000).decode == "second"
    assert choose("prefix_affinity", [replace(first, cached=980), second], 1_000).decode == "first"


def test_the_policy_of_the_documentation_works() -> None:
    text = (Path(__file__).parents[3] / "docs" / "routing.md").read_text(encoding="utf-8")
    source = text.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(compile(source, "docs/routing.md", "exec"), names)
    workers = [Worker("p", "prefill"), Worker("d", "decode", used_blocks=2), Worker("e", "decode", used_blocks=1)]
    route = names["ROUTING"]
    assert callable(route)
    choice = route(0.0, ask_of(workers, 100), fleet_of(workers), Random(1))
    assert (choice.decode, choice.prefill) == ("e", ("p",))
