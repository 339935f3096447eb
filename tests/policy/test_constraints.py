"""Labels, sessions and what keeping to them may cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.policy.constraints import Labelled, Sessions, closest_first, keeping, staying_at
from penstock.policy.forecast import forecast, price_s
from penstock.policy.routing import p_token, pairs
from penstock.policy.routing.api import Choice, Fleet, Route
from penstock.policy.routing.meeting import HANDOVER_S
from tests.policy.routing.fleets import LAYOUT, Rows, Worker, ask_of, fleet_of, some_workers

RATE = 1_000.0
A, B, C = (Worker(name, tokens_per_s=RATE) for name in "abc")


def labelled(**labels: str) -> Labelled:
    """Workers of these names; labels as zone=a,rack=b, and adapters as values without a name."""
    members = []
    for name, listed in labels.items():
        parts = [part.partition("=") for part in listed.split(",") if part]
        own = {key: value for key, equals, value in parts if equals}
        adapters = tuple(key for key, equals, _ in parts if not equals)
        members.append(msgspec.structs.replace(Worker(name).standing.member, labels=own, adapters=adapters))
    return Labelled(list(labels), members)


def test_labels_and_adapters_as_masks() -> None:
    some = labelled(a="zone=x,rack=1,french", b="zone=x,rack=2", c="zone=y")
    assert some.having([("zone", "x")]).tolist() == [True, True, False]
    assert some.having([("zone", "x"), ("rack", "2")]).tolist() == [False, True, False]
    assert some.having([("zone", "z")]).tolist() == [False] * 3
    assert some.having([]).tolist() == [True] * 3
    assert some.with_adapter("french").tolist() == [True, False, False]
    assert some.with_adapter("").tolist() == [True] * 3
    assert some.described() == "rack=1, rack=2, zone=x, zone=y"
    assert labelled(a="").described() == "none"


def test_the_first_of_the_preferred_labels_matters_most() -> None:
    some = labelled(a="zone=x,rack=1", b="zone=x", c="rack=1")
    wishes = closest_first(some, [("zone", "x"), ("rack", "1")])
    assert [wish.tolist() for wish in wishes] == [[True, False, False], [True, True, False]]


def choose(route: Route, workers: Sequence[Worker], tokens: int = 100) -> Choice:
    return route(0.0, ask_of(workers, tokens), fleet_of(workers), Random(1))


@pytest.mark.parametrize(("queued", "chosen"), [(0, "b"), (200, "b"), (300, "a")])
def test_a_preferred_worker_is_kept_to_until_its_queue_costs_too_much(queued: int, chosen: str) -> None:
    workers = [A, replace(B, queued=queued)]
    choice = choose(keeping(p_token.route, [np.array([False, True])], extra_s=0.25), workers)
    assert choice.decode == chosen
    assert ("preferred, for 0.2000 s more than a" in choice.why) == (queued == 200)


def test_the_first_wish_that_can_be_granted_is() -> None:
    workers = [A, replace(B, queued=1_000), replace(C, queued=100)]
    wishes = [np.array([False, False, False]), np.array([False, True, False]), np.array([False, True, True])]
    assert choose(keeping(p_token.route, wishes, extra_s=0.25), workers).decode == "c"


def test_a_session_stays_where_it_decodes_and_is_prefilled_anywhere() -> None:
    workers = [
        Worker("p", "prefill", tokens_per_s=RATE),
        Worker("d", "decode", tokens_per_s=RATE),
        Worker("e", "decode", running=1, tokens_per_s=RATE),
    ]
    fleet = fleet_of(workers)
    stay = staying_at(fleet, "e")
    assert stay is not None and stay.tolist() == [True, False, True]
    choice = choose(keeping(p_token.route, [stay], extra_s=1.0), workers)
    assert (choice.decode, choice.prefill) == ("e", ("p",))
    assert staying_at(fleet.only(np.array([True, True, False])), "e") is None
    assert staying_at(fleet, "gone") is None


@given(some_workers(), st.integers(1, 10_000), st.integers(0, 255), st.floats(0, 1), st.integers(0, 2**32))
def test_what_is_kept_costs_no_more_than_was_said_and_is_admissible(
    workers: list[Worker], prompt: int, bits: int, extra_s: float, seed: int
) -> None:
    wish = np.array([bool(bits >> index & 1) for index in range(len(workers))])
    ask, fleet = ask_of(workers, prompt), fleet_of(workers, Rows())
    best = pairs.route(0.0, ask, fleet, Random(seed))
    kept = keeping(pairs.route, [wish], extra_s)(0.0, ask, fleet, Random(seed))
    granted = all(wish[fleet.names.index(name)] for name in (kept.decode, *kept.prefill[:1]))
    assert granted or kept == best
    assert price_s(ask, fleet, kept) <= price_s(ask, fleet, best) + extra_s + 1e-9


def test_sessions_are_forgotten_the_oldest_first() -> None:
    sessions = Sessions(capacity=2)
    sessions.note(("m", "", "one"), ("a", 1))
    sessions.note(("m", "", "two"), ("b", 1))
    sessions.note(("m", "", "one"), ("c", 2))
    sessions.note(("m", "", "three"), ("a", 1))
    assert sessions.find(("m", "", "one")) == ("c", 2)
    assert sessions.find(("m", "", "two")) is None


def seen(choice: Choice, workers: Sequence[Worker], tokens: int = 1_000) -> tuple[float, float, int, float]:
    ask, fleet = ask_of(workers, tokens), fleet_of(workers)
    found = forecast(ask, fleet, choice)
    return found.first_s, found.own_s, found.tokens, found.tokens_per_s


def test_a_forecast_is_the_queue_and_what_is_not_cached_where_it_is_computed() -> None:
    workers = [replace(A, queued=500, cached=400, domain="net"), replace(B, memory="other", cached=900, domain="net")]
    assert seen(Choice("a", (), 0), workers) == pytest.approx((1.1, 0.6, 600, 2 * RATE))
    assert seen(Choice("b", ("a",), 0), workers) == pytest.approx((1.1 + HANDOVER_S, 0.6 + HANDOVER_S, 600, 2 * RATE))
    beside = [workers[0], replace(workers[1], memory="host")]
    own_s = 0.1 + HANDOVER_S
    assert seen(Choice("b", ("a",), 0), beside) == pytest.approx((own_s + 0.5, own_s, 100, 2 * RATE)), "in place"


def test_a_price_has_the_way_and_the_streams_as_well() -> None:
    workers = [Worker("pa", "prefill", memory="", domain="net", tokens_per_s=RATE)]
    workers.append(Worker("da", "decode", memory="", domain="net", tokens_per_s=RATE, running=32, step_s=0.01))
    ask, fleet = ask_of(workers, 1_000), fleet_of(workers, Rows())
    path = fleet.path(0)
    expected_s = 1.0 + path.start_s[1] + 1_000 * LAYOUT.token_bytes * path.byte_s[1] + 100 * 0.01
    assert path.byte_s[1] > 0
    assert price_s(ask, fleet, Choice("da", ("pa",), 0)) == pytest.approx(expected_s)


def test_a_narrowed_fleet_remembers_who_is_left() -> None:
    fleet: Fleet = fleet_of([A, B, C])
    assert fleet.usable.tolist() == [True] * 3
    assert fleet.only(np.array([True, False, True])).usable.tolist() == [True, False, True]
