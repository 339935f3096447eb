"""Choosing a pair: by price, in reach, and (D, D) where that is cheapest."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import NoWorker
from penstock.policy.routing import Ask, Facts, choose, decode_s, is_worth_asking, pair_s, with_priors

P = Facts("p", "prefill", "host", queued_tokens=0, streams=0)
D = Facts("d", "decode", "host", queued_tokens=0, streams=0)
LONG, SHORT = Ask(2_000, 100), Ask(2, 100)


def test_a_long_prompt_is_prefilled_elsewhere_and_a_short_one_at_home() -> None:
    choice = choose(LONG, [P, D], Random(1))
    assert (choice.decode, choice.prefill) == ("d", ("p",))
    assert "p prefills for d" in choice.why
    assert choose(SHORT, [P, D], Random(1)).prefill == ()


def test_a_queue_at_the_prefill_worker_sends_the_prompt_home() -> None:
    busy = replace(P, queued_tokens=100_000)
    assert choose(LONG, [busy, D], Random(1)).prefill == ()
    assert choose(LONG, [busy, replace(D, streams=100)], Random(1)).prefill == ("p",)


def test_a_worker_in_another_memory_prefills_for_itself() -> None:
    assert choose(LONG, [replace(P, shares_with="elsewhere"), D], Random(1)).prefill == ()
    assert choose(LONG, [replace(P, shares_with=""), replace(D, shares_with="")], Random(1)).prefill == ()


def test_roles_are_preferences() -> None:
    assert choose(LONG, [P], Random(1)).decode == "p"
    assert choose(LONG, [replace(D, worker="a"), D], Random(1)).decode in ("a", "d")


def test_alternatives_come_in_order_of_price() -> None:
    slow, slower = replace(P, worker="q", queued_tokens=500), replace(P, worker="r", queued_tokens=900)
    assert choose(LONG, [slower, P, slow, D], Random(1)).prefill == ("p", "q", "r")


def test_the_draining_get_nothing() -> None:
    assert choose(LONG, [replace(P, is_draining=True), D], Random(1)).prefill == ()
    with pytest.raises(NoWorker, match="penstock worker --join"):
        choose(LONG, [replace(D, is_draining=True)], Random(1))


def test_ties_are_spread() -> None:
    fleet = [replace(D, worker=f"d{i}") for i in range(4)]
    rng = Random(1)
    assert {choose(LONG, fleet, rng).decode for _ in range(60)} == {"d0", "d1", "d2", "d3"}


facts = st.builds(
    Facts,
    worker=st.uuids().map(str),
    role=st.sampled_from(["prefill", "decode", "any"]),
    shares_with=st.sampled_from(["a", "b", ""]),
    queued_tokens=st.integers(0, 10_000),
    streams=st.integers(0, 64),
    prefill_tokens_per_s=st.sampled_from([0.0, 500.0, 20_000.0]),
    decode_step_s=st.sampled_from([0.0, 0.005, 0.05]),
    is_draining=st.booleans(),
)


@given(st.lists(facts, min_size=1, max_size=6), st.integers(1, 10_000), st.integers(0, 2**32))
def test_the_choice_is_the_cheapest_admissible_pair(fleet: list[Facts], prompt: int, seed: int) -> None:
    ask = Ask(prompt, 64)
    ready = [f for f in with_priors(fleet) if not f.is_draining]
    if not ready:
        return
    decoders = [f for f in ready if f.role != "prefill"] or ready
    prefillers = [f for f in ready if f.role != "decode"] or ready
    prices = [
        pair_s(ask, p, d) + decode_s(ask, d)
        for d in decoders
        for p in [d, *prefillers]
        if p is d or (p.shares_with and p.shares_with == d.shares_with)
    ]
    assert choose(ask, fleet, Random(seed)).seconds == min(prices)


def test_a_decode_worker_keeps_what_its_cache_nearly_holds() -> None:
    assert not is_worth_asking(uncached_tokens=1, streams=0, own_tokens_per_s=2_000, wait_s=0)
    assert is_worth_asking(uncached_tokens=500, streams=0, own_tokens_per_s=2_000, wait_s=0)
    assert not is_worth_asking(uncached_tokens=500, streams=0, own_tokens_per_s=2_000, wait_s=1)
    assert is_worth_asking(uncached_tokens=500, streams=8, own_tokens_per_s=2_000, wait_s=1)
