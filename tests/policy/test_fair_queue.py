"""The fair queue: shares by weight, nobody starved, nothing kept of those that left."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.policy.fair_queue import FairQueue, Waiting

LARGEST = 1_000
WEIGHTS = {"heavy": 3.0, "light": 0.5}
TENANTS = ("heavy", "light", "plain")
some_tokens = st.integers(1, LARGEST)
some_waiting = st.builds(
    Waiting,
    tenant=st.sampled_from(TENANTS),
    priority=st.integers(0, 2),
    tokens=some_tokens,
    lane=st.sampled_from(["near", "far"]),
)


def waiting(tenant: str = "plain", tokens: int = 10, priority: int = 0, lane: str = "") -> Waiting:
    return Waiting(tenant, priority, tokens, lane)


def queue_of(entries: Sequence[Waiting]) -> FairQueue:
    queue = FairQueue(WEIGHTS)
    for one in entries:
        queue.put(one)
    return queue


def served(queue: FairQueue) -> list[Waiting]:
    order = []
    while (one := queue.find_next()) is not None:
        queue.serve(one)
        order.append(one)
    return order


@given(st.lists(some_tokens, min_size=20, max_size=60), st.lists(some_tokens, min_size=20, max_size=60), st.data())
def test_tenants_that_both_wait_get_tokens_by_weight(heavy: list[int], light: list[int], data: st.DataObject) -> None:
    """Over every interval: within one largest request of each."""
    entries = [waiting("heavy", tokens) for tokens in heavy] + [waiting("light", tokens) for tokens in light]
    queue = queue_of(data.draw(st.permutations(entries)))
    left = {"heavy": len(heavy), "light": len(light)}
    got = {"heavy": 0.0, "light": 0.0}
    ahead = [0.0]
    while all(left.values()):
        one = queue.find_next()
        assert one is not None
        queue.serve(one)
        left[one.tenant] -= 1
        got[one.tenant] += one.tokens / WEIGHTS[one.tenant]
        ahead.append(got["heavy"] - got["light"])
    bound = LARGEST / WEIGHTS["heavy"] + LARGEST / WEIGHTS["light"]
    assert max(ahead) - min(ahead) <= bound + 1e-9


@given(st.lists(some_tokens, min_size=1, max_size=6), st.integers(100, LARGEST))
def test_nobody_starves_though_a_stranger_comes_at_every_turn(backlog: list[int], tokens: int) -> None:
    """One more stranger waits for each of the backlog that was served: so many turns move virtual time by one tag."""
    mine = [waiting("plain", each) for each in backlog]
    queue = queue_of(mine)
    for turn in range(len(backlog) * sum(each // tokens + 2 for each in backlog)):
        queue.put(waiting(f"stranger-{turn}", tokens))
        one = queue.find_next()
        assert one is not None
        queue.serve(one)
        if one in mine:
            mine.remove(one)
    assert not mine


@given(st.lists(some_waiting, max_size=40))
def test_classes_go_one_before_the_other_and_a_tenants_requests_in_order(entries: list[Waiting]) -> None:
    order = served(queue_of(entries))
    assert sorted(map(id, order)) == sorted(map(id, entries))
    assert all(one.priority <= other.priority for one, other in pairwise(order))
    for tenant in TENANTS:
        for priority in range(3):
            own = [one for one in entries if (one.tenant, one.priority) == (tenant, priority)]
            assert [one for one in order if one in own] == own


@given(st.lists(st.tuples(some_waiting, st.sampled_from(["serve", "remove", "stay"])), max_size=60))
def test_who_left_is_forgotten(steps: list[tuple[Waiting, str]]) -> None:
    queue = FairQueue(WEIGHTS)
    there: list[Waiting] = []
    for one, fate in steps:
        queue.put(one)
        there.append(one)
        if fate == "remove":
            queue.remove(one)
            queue.remove(one)
            there.remove(one)
        elif fate == "serve":
            first = queue.find_next()
            assert first is not None
            queue.serve(first)
            there.remove(first)
        assert len(queue) == len(there)
    assert sorted(map(id, served(queue))) == sorted(map(id, there))
    assert queue.find_next() is None
    assert queue.find_victim() is None
    assert queue.tokens_ahead(waiting()) == 0


def test_a_blocked_lane_is_overtaken_by_others_only() -> None:
    near, behind, far = waiting(lane="near"), waiting(lane="near"), waiting(lane="far")
    queue = queue_of([near, behind, far])
    assert queue.find_next() is near
    assert queue.find_next({"near"}) is far
    assert queue.find_next({"near", "far"}) is None
    queue.serve(far)
    assert served(queue) == [near, behind]


def test_what_was_removed_costs_its_tenant_nothing() -> None:
    large, small, other = waiting("plain", LARGEST), waiting("plain", 10), waiting("other", 20)
    queue = queue_of([large, small, other])
    queue.remove(large)
    assert served(queue) == [small, other]


def test_whoever_has_most_waiting_per_weight_makes_room_its_newest_first() -> None:
    queue = queue_of([waiting("heavy") for _ in range(4)] + [waiting("plain") for _ in range(2)])
    newest = waiting("plain")
    queue.put(newest)
    assert queue.find_victim() is newest
    late = waiting("heavy", priority=5)
    queue.put(late)
    assert queue.find_victim() is late, "the least urgent class comes first"
    assert queue.has_rivals(newest)
    assert not queue.has_rivals(late)


def test_what_is_ahead_is_what_fairness_lets_others_have() -> None:
    queue = queue_of([waiting("plain", 100) for _ in range(10)] + [waiting("urgent", 50, priority=-1)])
    assert queue.tokens_ahead(waiting("plain", 100)) == pytest.approx(1_050)
    assert queue.tokens_ahead(waiting("other", 100)) == pytest.approx(150)
    assert queue.tokens_ahead(waiting("heavy", 300)) == pytest.approx(150)
    assert queue.tokens_ahead(waiting("plain", 100, priority=-2)) == 0


@given(st.lists(some_tokens, min_size=1, max_size=30), st.lists(some_tokens, min_size=1, max_size=30), some_tokens)
def test_what_was_foretold_to_be_ahead_is(plain: list[int], other: list[int], tokens: int) -> None:
    queue = queue_of([waiting("plain", each) for each in plain] + [waiting("other", each) for each in other])
    mine = waiting("plain", tokens)
    foretold = queue.tokens_ahead(mine)
    queue.put(mine)
    order = served(queue)
    ahead = sum(one.tokens for one in order[: order.index(mine)])
    assert foretold - LARGEST <= ahead <= foretold
