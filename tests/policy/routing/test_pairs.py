"""The default policy: the cheapest pair, in reach, and (D, D) where that is cheapest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.policy.routing import is_worth_asking
from penstock.policy.routing.api import HANDOVER_S, PRIOR_TOKENS_PER_S, Choice, Wiring
from penstock.policy.routing.pairs import route
from penstock.policy.routing.roster import PRIOR_STEP_S
from tests.policy.routing.fleets import LAYOUT, Distances, Worker, ask_of, fleet_of, some_workers
from tests.policy.routing.test_policies import decoders_of, prefillers_of, reaches

P = Worker("p", "prefill")
D = Worker("d", "decode")
LONG, SHORT = 2_000, 2


def choose(prompt_tokens: int, workers: Sequence[Worker], seed: int = 1, wiring: Wiring | None = None) -> Choice:
    return route(0.0, ask_of(workers, prompt_tokens), fleet_of(workers, wiring), Random(seed))


def test_a_long_prompt_is_prefilled_elsewhere_and_a_short_one_at_home() -> None:
    choice = choose(LONG, [P, D])
    assert (choice.decode, choice.prefill) == ("d", ("p",))
    assert "p prefills for d" in choice.why
    assert choose(SHORT, [P, D]).prefill == ()


def test_a_queue_at_the_prefill_worker_sends_the_prompt_home() -> None:
    busy = replace(P, queued=100_000)
    assert choose(LONG, [busy, D]).prefill == ()
    behind = choose(LONG, [busy, replace(D, running=100)])
    assert behind.prefill == ("p",)
    assert behind.wait_s == 100_000 / PRIOR_TOKENS_PER_S


def test_a_cached_prompt_stays_where_it_is() -> None:
    assert choose(LONG, [P, replace(D, cached=1_999)]).prefill == ()
    holder = replace(D, name="e", cached=1_999)
    assert choose(LONG, [P, D, holder]).decode == "e"


def test_a_worker_in_another_memory_prefills_for_itself() -> None:
    assert choose(LONG, [replace(P, memory="elsewhere"), D]).prefill == ()
    assert choose(LONG, [replace(P, memory=""), replace(D, memory="")]).prefill == ()


def test_over_a_network_the_way_is_part_of_the_price() -> None:
    near, far = (replace(P, name=name, memory="", domain="net") for name in ("e", "z"))
    decode = replace(D, memory="", domain="net")
    assert choose(LONG, [far, near, decode], wiring=Distances()).prefill == ("e", "z")


def test_roles_are_preferences() -> None:
    assert choose(LONG, [P]).decode == "p"
    assert choose(LONG, [replace(D, name="a"), D]).decode in ("a", "d")


def test_alternatives_come_in_order_of_price() -> None:
    slow, slower = replace(P, name="q", queued=500), replace(P, name="r", queued=900)
    assert choose(LONG, [slower, P, slow, D]).prefill == ("p", "q", "r")


def test_large_fleets_are_paired_among_the_most_promising() -> None:
    prefill = [replace(P, name=f"p{i}", queued=10 * i) for i in reversed(range(100))]
    decode = [replace(D, name=f"d{i}", running=i) for i in reversed(range(100))]
    choice = choose(LONG, [*prefill, *decode])
    assert (choice.decode, choice.prefill) == ("d0", ("p0", "p1", "p2"))


@given(some_workers(), st.integers(1, 10_000), st.integers(0, 2**32))
def test_the_choice_is_the_cheapest_admissible_pair(workers: list[Worker], prompt: int, seed: int) -> None:
    rates = [worker.tokens_per_s for worker in workers if worker.tokens_per_s] or [PRIOR_TOKENS_PER_S]
    steps = [worker.step_s for worker in workers if worker.step_s] or [PRIOR_STEP_S]

    def price(prefill: Worker, decode: Worker) -> float:
        rate = prefill.tokens_per_s or sum(rates) / len(rates)
        step_s = decode.step_s or sum(steps) / len(steps)
        later_s = 100 * step_s * decode.running / 32
        lacks = prompt - min(decode.cached, prompt - 1)
        if prefill is decode:
            return later_s + prefill.queued / rate + (decode.running + 2) * lacks / rate
        later_s += HANDOVER_S + prefill.queued / rate
        if prefill.memory and prefill.memory == decode.memory:
            return later_s + (prefill.running + 1) * lacks / rate
        computed = prompt - min(prefill.cached, prompt - 1)
        start_s, byte_s = Distances().prices(prefill.name, [decode.name])
        way_s = float(start_s[0]) + float(byte_s[0]) * lacks * LAYOUT.token_bytes
        return later_s + (prefill.running + 1) * computed / rate + way_s

    prices = {
        (prefill.name, decode.name): price(prefill, decode)
        for decode in decoders_of(workers)
        for prefill in [decode, *prefillers_of(workers)]
        if reaches(prefill, decode)
    }
    choice = choose(prompt, workers, seed, Distances())
    assert choice.cost == pytest.approx(min(prices.values()))
    assert prices[((*choice.prefill, choice.decode)[0], choice.decode)] == pytest.approx(choice.cost)


def test_a_decode_worker_keeps_what_its_cache_nearly_holds() -> None:
    assert not is_worth_asking(1, 1, streams=0, own_tokens_per_s=2_000, wait_s=0)
    assert is_worth_asking(500, 500, streams=0, own_tokens_per_s=2_000, wait_s=0)
    assert not is_worth_asking(500, 500, streams=0, own_tokens_per_s=2_000, wait_s=1)
    assert is_worth_asking(500, 500, streams=8, own_tokens_per_s=2_000, wait_s=1)
    assert not is_worth_asking(500, 5_000, streams=0, own_tokens_per_s=2_000, wait_s=0)
