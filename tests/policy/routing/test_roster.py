"""A roster: columns that follow reports and bookings, who may be chosen, and what is believed to be cached."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import msgspec
import pytest

from penstock.cluster import StepPrices
from penstock.errors import NoWorker
from penstock.policy.routing import pairs
from penstock.policy.routing.api import Choice, Fleet, Indices
from penstock.policy.routing.p_token import route
from penstock.policy.routing.roster import PRIOR_STEP_S, Roster
from penstock.request import Request, Sampling
from penstock.tokens import pack
from tests.policy.routing.fleets import LAYOUT, Worker, fleet_of, roster_of

P = Worker("p", "prefill")
D = Worker("d", "decode")
HERE = Choice("d", (), 0.0)
PAIR = Choice("d", ("p",), 0.0)
PROMPT = pack(range(640))


def request(name: str = "r", prompt: bytes = PROMPT, salt: str = "") -> Request:
    return Request(name, "m", prompt, Sampling(max_tokens=64), salt=salt)


def book(roster: Roster, choice: Choice, asked: Request) -> None:
    ask, hashes = roster.ask(asked)
    roster.book(asked.id, ask, hashes, choice, 0.0)


def update(roster: Roster, *workers: Worker) -> None:
    roster.update({worker.name: worker.standing for worker in workers}, 0.0)


def chosen(fleet: Fleet, positions: Indices) -> list[str]:
    return [fleet.names[int(position)] for position in positions]


def cached(roster: Roster, asked: Request) -> list[float]:
    found: list[float] = roster.ask(asked)[0].cached_tokens.tolist()
    return found


def test_queues_are_what_was_reported_and_booked_since_less_what_time_took_off() -> None:
    roster = roster_of([replace(P, queued=1_000, tokens_per_s=1_000.0), D])
    assert roster.fleet(0.25).queued_tokens.tolist() == [750, 0]
    book(roster, PAIR, request())
    assert roster.fleet(0.25).queued_tokens.tolist() == pytest.approx([1_390, 0])
    update(roster, replace(P, queued=1_000, tokens_per_s=1_000.0), D)  # too soon after to have it in
    assert roster.fleet(0.5).queued_tokens.tolist() == pytest.approx([1_140, 0])
    assert roster.fleet(9.0).wait_s.tolist() == [0, 0]


def test_load_is_what_was_reported_or_booked_whichever_is_more() -> None:
    roster = roster_of([replace(P, waiting=2), replace(D, running=1, used_blocks=500)])
    book(roster, PAIR, request())
    fleet = roster.fleet(0.0)
    assert fleet.prefills.tolist() == [2, 0]
    assert fleet.streams.tolist() == [0, 1]
    assert fleet.used_blocks.tolist() == [0, 500]
    roster.prefilled("r", 0.0)
    update(roster, P, D)
    assert roster.fleet(0.0).prefills.tolist() == [0, 0]
    update(roster, P, D)
    assert roster.fleet(0.0).streams.tolist() == [0, 1]
    roster.release("r", 0.0)
    assert roster.fleet(0.0).streams.tolist() == [0, 0]


def test_a_newcomer_counts_as_average() -> None:
    workers = [replace(D, tokens_per_s=1_000.0), replace(D, name="e", tokens_per_s=3_000.0), replace(D, name="new")]
    fleet = fleet_of(workers)
    assert fleet.prefill_tokens_per_s.tolist() == [1_000, 3_000, 2_000]
    assert fleet.decode_step_s.tolist() == [PRIOR_STEP_S] * 3


def test_prices_that_no_step_has_confirmed_do_not_count() -> None:
    guessed = StepPrices((0.002, 1e-4, 1e-8, 1e-4, 1e-7))
    fresh = replace(D, name="new", prices=guessed)
    assert not fleet_of([fresh]).prices.any()
    half = replace(D, name="half", prices=guessed, tokens_per_s=9_000.0)  # has not decoded yet
    assert fleet_of([half]).prices[:, 0].tolist() == [1e-4, 1e-8, 0, 0]


def test_roles_are_preferences() -> None:
    fleet = fleet_of([P, D, Worker("a")])
    assert (chosen(fleet, fleet.prefillers), chosen(fleet, fleet.decoders)) == (["p", "a"], ["d", "a"])
    fleet = fleet_of([P])
    assert (chosen(fleet, fleet.decoders), fleet.is_split) == (["p"], False)


def test_a_prefill_worker_that_reaches_no_decoder_is_none() -> None:
    fleet = fleet_of([replace(P, memory="far"), D])
    assert (chosen(fleet, fleet.prefillers), fleet.is_split) == ([], False)
    fleet = fleet_of([replace(P, memory="far", domain="net"), replace(D, domain="net")])
    assert (chosen(fleet, fleet.prefillers), fleet.is_split) == (["p"], True)


def test_the_draining_are_left_out() -> None:
    roster = roster_of([P, replace(D, is_draining=True)])
    assert roster.fleet(0.0).names == ["p"]
    update(roster, replace(P, is_draining=True))
    with pytest.raises(NoWorker, match="penstock worker --join"):
        roster.fleet(0.0)


def test_the_tried_are_out_and_the_avoided_come_last() -> None:
    roster = roster_of([P, D, replace(D, name="e")])
    fleet = roster.fleet(0.0, avoided=["d"])
    assert chosen(fleet, fleet.decoders) == ["e"]
    fleet = roster.fleet(0.0, tried=["e"], avoided=["d", "p"])
    assert (chosen(fleet, fleet.decoders), chosen(fleet, fleet.prefillers)) == (["d"], ["p"])
    fleet = roster.fleet(0.0)
    assert chosen(fleet, fleet.decoders) == ["d", "e"]
    with pytest.raises(NoWorker):
        roster.fleet(0.0, tried=["p", "d", "e"])


def test_a_masked_fleet_shows_the_load_of_now() -> None:
    roster = roster_of([P, D, replace(D, name="e")])
    assert roster.fleet(0.0, avoided=["e"]).streams.tolist() == [0, 0, 0]
    book(roster, HERE, request())
    assert roster.fleet(0.0, avoided=["e"]).streams.tolist() == [0, 1, 0]
    update(roster, P, D, replace(D, name="e"), replace(D, name="f"))
    fleet = roster.fleet(0.0, avoided=["e"])
    assert chosen(fleet, fleet.decoders) == ["d", "f"]


def test_a_prompt_is_believed_to_be_where_it_was_sent() -> None:
    roster = roster_of([P, D])
    book(roster, PAIR, request())
    assert cached(roster, request("again")) == [
        0,
        576,
    ]  # in place: in the decode worker's memory alone; all but one token
    assert cached(roster, request("longer", pack(range(700)))) == [0, 640]
    assert cached(roster, request("another tenant", salt="t")) == [0, 0]


def test_a_prompt_that_is_moved_stays_with_both_and_its_bytes_are_booked() -> None:
    roster = roster_of([replace(P, memory="far", domain="net"), replace(D, domain="net")])
    book(roster, PAIR, request())
    assert cached(roster, request("again")) == [576, 576]
    fleet = roster.fleet(0.0)
    assert fleet.outgoing_bytes.tolist() == [640 * LAYOUT.token_bytes, 0]
    assert fleet.incoming_bytes.tolist() == [0, 640 * LAYOUT.token_bytes]
    book(roster, PAIR, request("again"))
    assert roster.fleet(0.0).incoming_bytes[1] == (640 + 64) * LAYOUT.token_bytes


def test_a_restarted_worker_is_believed_to_hold_nothing() -> None:
    roster = roster_of([P, D])
    book(roster, HERE, request())
    update(roster, P, replace(D, epoch=2))
    assert cached(roster, request("again")) == [0, 0]


def test_a_change_of_role_forgets_nothing() -> None:
    roster = roster_of([P, D])
    book(roster, HERE, request())
    update(roster, P, replace(D, role="any"))
    assert cached(roster, request("again")) == [0, 576]
    assert roster.fleet(0.0).streams.tolist() == [0, 1]


def test_blocks_of_different_sizes_are_told_apart_by_the_largest() -> None:
    coarse = msgspec.structs.replace(LAYOUT, block_tokens=512)
    standings = {worker.name: worker.standing for worker in (P, D)}
    member = msgspec.structs.replace(standings["d"].member, layout=coarse)
    standings["d"] = msgspec.structs.replace(standings["d"], member=member)
    roster = Roster(None)
    roster.update(standings, 0.0)
    assert not roster.fleet(0.0).is_split  # blocks of another shape cannot be written
    book(roster, HERE, request())
    assert cached(roster, request("again")) == [0, 512]


def test_booked_load_spreads_requests_that_come_before_the_next_report() -> None:
    workers = [Worker(f"w{number}") for number in range(8)]
    roster, rng = roster_of(workers), Random(1)
    for number in range(80):
        asked = request(f"r{number}", pack(range(number, number + 640)))
        ask, hashes = roster.ask(asked)
        roster.book(asked.id, ask, hashes, route(0.0, ask, roster.fleet(0.0), rng), 0.0)
    assert roster.fleet(0.0).streams.tolist() == [10] * 8


def burst(roster: Roster, prompts: int, now: float, seed: int = 1) -> list[str]:
    """Who prefills for prompts that come at once, all different, by the default policy."""
    rng, chosen = Random(seed), []
    for number in range(prompts):
        asked = request(f"{now} {number}", pack(rng.randrange(1 << 16) for _ in range(640)))
        ask, found = roster.ask(asked)
        choice = pairs.route(now, ask, roster.fleet(now), rng)
        roster.book(asked.id, ask, found, choice, now)
        chosen.append((*choice.prefill, choice.decode)[0])
    return chosen


def test_a_newcomer_gets_its_share_and_is_not_stampeded() -> None:
    old = [Worker(f"w{number}", tokens_per_s=1_000.0, queued=2_000) for number in range(4)]
    roster = roster_of([*old, Worker("new")])
    burst(roster, 40, now=0.0)
    waits = roster.fleet(0.0).wait_s
    assert waits.max() - waits.min() <= 2 * 0.64  # of prompts that take 0.64 s


def test_reports_that_are_old_do_not_herd_a_burst_onto_one_worker() -> None:
    roster = roster_of([Worker(f"w{number}", tokens_per_s=1_000.0, queued=1_000 * number) for number in range(5)])
    for second in (0.0, 2.5, 5.0):  # and not a report in between
        burst(roster, 15, now=second)
        waits = roster.fleet(second).wait_s
        assert waits.max() - waits.min() <= max(2 * 0.64, 4.0 - second)


def test_two_routers_that_know_the_same_do_not_choose_the_same() -> None:
    workers = [Worker(f"w{number}", tokens_per_s=1_000.0) for number in range(8)]
    first, second = (burst(roster_of(workers), 8, now=0.0, seed=seed) for seed in (1, 2))
    assert sorted(first) == sorted(second) == sorted(worker.name for worker in workers)
    assert first != second
