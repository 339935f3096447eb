"""One model's workers as a router knows them: their reports, what it booked there, what they are believed to hold.

The columns of a `Fleet` are kept here: laid out anew when workers come, leave or change, else written in place.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np

from penstock.cluster import Load, Member, Standing
from penstock.errors import NoWorker
from penstock.policy.ledger import INCOMING_BYTES, OUTGOING_BYTES, REPORTED, Booking, Ledger
from penstock.policy.prefix_index import Incarnation, PrefixIndex
from penstock.policy.prefixes import RESTORE_BYTES_PER_S, Found, Prefixes, incarnation
from penstock.policy.routing.api import (
    EXPECTED_OUTPUT_TOKENS,
    PRIOR_TOKENS_PER_S,
    Ask,
    Choice,
    Fleet,
    Floats,
    Indices,
)
from penstock.policy.routing.meeting import HANDOVER_S
from penstock.policy.routing.ways import Ways, Wiring
from penstock.request import Request

OVER_S = 20.0
PRIOR_STEP_S = 0.02  # until anybody has measured anything


class Roster:
    """Owned by one router."""

    def __init__(self, wiring: Wiring | None) -> None:
        self.ledger = Ledger()
        self._wiring = wiring
        self._prefixes = Prefixes()
        self._members: list[Member] = []
        self._loads: list[Load] = []
        self._columns: dict[str, int] = {}
        self._ids: list[Incarnation] = []
        self._reported: Floats = np.zeros((REPORTED, 0))
        self._measured: Floats = np.zeros((6, 0))
        self._occupancy = Occupancy(0)
        self._load: Floats = np.zeros((REPORTED, 0))  # what the fleet shows
        self._fleet: Fleet | None = None  # None: nobody is there
        self._masked: tuple[tuple[str, ...], Fleet | None] = ((), None)
        self._booked = 0

    def update(self, standings: Mapping[str, Standing], now: float) -> None:
        """These workers serve the model now. Those that drain take no requests, so they are left out."""
        ready = [standing for standing in standings.values() if not standing.draining]
        members = [standing.member for standing in ready]
        if members != self._members:
            self._seat(members)
        if self._fleet is None:
            return
        fresh = [column for column, standing in enumerate(ready) if standing.load is not self._loads[column]]
        for column in fresh:
            load = ready[column].load
            self._measured[:, column] = load.prefill_tokens_per_s, load.decode_step_s, *_prices(load)
            self._reported[:, column] = load.waiting, load.running, load.blocks - load.free_blocks
        self._fleet.prefill_tokens_per_s[:] = _with_prior(self._measured[0], PRIOR_TOKENS_PER_S)
        self._fleet.decode_step_s[:] = _with_prior(self._measured[1], PRIOR_STEP_S)
        self._fleet.prices[:] = [_with_prior(row, 0.0) for row in self._measured[2:]]
        for column in fresh:
            load, rate = ready[column].load, self._fleet.prefill_tokens_per_s[column]
            self.ledger.report(self._members[column].worker, now, load.queued_tokens / rate)
            self._occupancy.report(column, self._loads[column], load, rate)
            self._loads[column] = load

    def fleet(self, now: float, tried: Collection[str] = (), avoided: Collection[str] = ()) -> Fleet:
        """As of `now`, without those that were tried; without the avoided too, unless nobody else is left.

        Raises NoWorker if nobody is left at all.
        """
        fleet = self._fleet
        if fleet is not None and (tried or avoided):
            fleet = self._without((*tried, "", *avoided), tried, avoided)
        if fleet is None:
            raise NoWorker("no worker takes requests now; start one with `penstock worker --join HOST:PORT`")
        np.maximum(self._reported, self.ledger.booked[:REPORTED], out=self._load)
        np.subtract(self.ledger.busy_until_s, now, out=fleet.wait_s)
        np.maximum(fleet.wait_s, 0.0, out=fleet.wait_s)
        np.multiply(fleet.wait_s, fleet.prefill_tokens_per_s, out=fleet.queued_tokens)
        return fleet

    def index(self, worker: Incarnation) -> PrefixIndex | None:
        """Where KV events of this worker belong; None if it is not there."""
        return self._prefixes.index(worker)

    def ask(self, request: Request) -> tuple[Ask, Found]:
        """What a policy is asked, and what was found of the prompt."""
        found = self._prefixes.find(request)
        layout = self._members[0].layout
        token_bytes = round(layout.block_bytes / layout.tokens_per_block)  # of windows no more than the last is moved
        restore_s = found.lower_tokens * (token_bytes / RESTORE_BYTES_PER_S)
        left_tokens = request.sampling.max_tokens - request.progress.count
        ask = Ask(self._booked, request.sequence_tokens, left_tokens, token_bytes, found.tokens, restore_s)
        return ask, found

    def cached_tokens(self, ask: Ask, worker: str) -> int:
        """How much of the prompt `worker` is believed to hold."""
        return int(ask.cached_tokens[self._columns[worker]])

    def corrects(self, ask: Ask, found: Found, choice: Choice) -> bool:
        """Looks at every block that the chosen workers are taken to hold; true if `ask` was wrong and is mended."""
        was_wrong = False
        for name in (choice.decode, *choice.prefill[:1]):
            column = self._columns[name]
            believed = ask.cached_tokens[column]
            if believed and (held := self._prefixes.recount(self._ids[column], found, ask.prompt_tokens)) < believed:
                ask.cached_tokens[column], was_wrong = held, True
        return was_wrong

    def book(self, request_id: str, ask: Ask, found: Found, choice: Choice, now: float) -> None:
        """`choice` is being carried out: its load is counted, and its prompt believed to be where it will be."""
        self._booked += 1
        decode = self._columns[choice.decode]
        prefill = self._columns[choice.prefill[0]] if choice.prefill else decode
        fleet = self._present()
        is_moved = not (prefill == decode or fleet.shares_memory(prefill, decode))
        held_by = prefill if is_moved else decode
        cached = float(ask.cached_tokens[held_by])
        prefill_s = float(fleet.prompt_s_at(prefill, ask.prompt_tokens - cached, cached))
        move_bytes = int(ask.uncached_tokens[decode]) * ask.token_bytes if is_moved else 0
        start_s, byte_s = fleet.ways.between(prefill, decode)
        moved_s = float(fleet.wait_s[prefill]) + prefill_s + HANDOVER_S + start_s + byte_s * move_bytes
        self.ledger.book(
            request_id,
            Booking(
                decode=choice.decode,
                prefill=self._members[prefill].worker,
                prefill_s=prefill_s,
                blocks=self._members[decode].layout.blocks_for(
                    ask.prompt_tokens + min(ask.max_tokens, EXPECTED_OUTPUT_TOKENS)
                ),
                move_bytes=move_bytes,
                move_bytes_per_s=move_bytes / moved_s,
            ),
            now,
        )
        for column in (prefill, decode) if is_moved else (decode,):
            self._prefixes.learn(request_id, self._ids[column], found)

    def prefilled(self, request_id: str, now: float) -> None:
        """The request's first token came. Idempotent."""
        self.ledger.prefilled(request_id)
        self._prefixes.end(request_id, now)

    def moved(self, request_id: str) -> None:
        """The request's second token came. Idempotent."""
        self.ledger.moved(request_id)

    def release(self, request_id: str, now: float) -> None:
        """The request is over, or on no worker any more. Idempotent."""
        self.ledger.release(request_id)
        self._prefixes.end(request_id, now)

    def _present(self) -> Fleet:
        if self._fleet is None:
            raise NoWorker("no worker takes requests now; start one with `penstock worker --join HOST:PORT`")
        return self._fleet

    def _without(self, key: tuple[str, ...], tried: Collection[str], avoided: Collection[str]) -> Fleet | None:
        if self._masked[0] != key and self._fleet is not None:
            names = self._fleet.names
            left = np.array([name not in tried for name in names])
            preferred = left & np.array([name not in avoided for name in names])
            self._masked = (key, self._fleet.only(preferred if preferred.any() else left) if left.any() else None)
        return self._masked[1]

    def _seat(self, members: list[Member]) -> None:
        names = [member.worker for member in members]
        self._members, self._loads = members, [Load()] * len(members)
        self._columns = {name: column for column, name in enumerate(names)}
        self._ids = [incarnation(member) for member in members]
        self._reported, self._load = (np.zeros((REPORTED, len(members))) for _ in range(2))
        self._measured = np.zeros((6, len(members)))
        self._occupancy = Occupancy(len(members))
        self._masked = ((), None)
        networks = _numbered([member.domain and (member.domain, member.layout) for member in members])
        ways = Ways(networks, [self._wiring.climb(member.device) if self._wiring else () for member in members])
        self.ledger.seat(names, ways.carry)
        self._prefixes.seat(members)
        self._fleet = self._lay_out(names, networks, ways) if members else None

    def _lay_out(self, names: Sequence[str], networks: Indices, ways: Ways) -> Fleet:
        members, load, booked = self._members, self._load, self.ledger.booked
        nothing = np.zeros((3, len(members)))
        return Fleet(
            names=names,
            prefers_prefill=np.array([member.role != "decode" for member in members]),
            prefers_decode=np.array([member.role != "prefill" for member in members]),
            memory=_numbered([member.memory and (member.memory, member.layout) for member in members]),
            network=networks,
            wait_s=nothing[0],
            queued_tokens=nothing[1],
            prefills=load[0],
            streams=load[1],
            used_blocks=load[2],
            blocks=np.array([float(member.blocks) for member in members]),
            block_tokens=np.array([member.layout.tokens_per_block for member in members]),
            prefill_tokens_per_s=np.full(len(members), PRIOR_TOKENS_PER_S),
            decode_step_s=np.full(len(members), PRIOR_STEP_S),
            prices=np.zeros((4, len(members))),
            arrivals_per_s=self._occupancy.prefills_per_s,
            busy_share=self._occupancy.busy_share,
            chunk_tokens=np.array([float(member.chunk_tokens or member.max_context_tokens) for member in members]),
            outgoing_bytes=booked[OUTGOING_BYTES],
            incoming_bytes=booked[INCOMING_BYTES],
            ways=ways,
        ).only(np.full(len(members), True))


class Occupancy:
    """How often prompts come to each worker and how busy they keep it, from its reports: of whatever router they are.

    Means over about the last `OVER_S`.
    """

    def __init__(self, workers: int) -> None:
        self.prefills_per_s: Floats = np.zeros(workers)
        self.busy_share: Floats = np.zeros(workers)

    def report(self, column: int, before: Load, load: Load, tokens_per_s: float) -> None:
        """Two reports of one worker, one after the other."""
        passed_s = load.at_s - before.at_s
        if not before.blocks or passed_s <= 0:
            return
        kept = math.exp(-passed_s / OVER_S)
        for means, added in (
            (self.prefills_per_s, load.prefills - before.prefills),
            (self.busy_share, (load.computed_tokens - before.computed_tokens) / tokens_per_s),
        ):
            means[column] = kept * means[column] + (1 - kept) * added / passed_s


def _prices(load: Load) -> Sequence[float]:
    """Of a prompt token, a pair, a sequence and a token read, see `policy.latency.steps`; 0: not known.

    Workers report prices from the start, when they have computed nothing yet: they count once there is a rate as well.
    """
    prices = load.step_prices.prices[1:5] if load.step_prices is not None else ()
    if len(prices) != 4:
        return [0.0] * 4
    rates = (load.prefill_tokens_per_s, load.prefill_tokens_per_s, load.decode_step_s, load.decode_step_s)
    return [max(0.0, price) if rate else 0.0 for price, rate in zip(prices, rates, strict=True)]


def _numbered(domains: Sequence[Hashable]) -> Indices:
    """Equal numbers for equal domains; -1 for none."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(domain, len(numbers)) if domain else -1 for domain in domains], np.intp)


def _with_prior(measured: Floats, prior: float) -> Floats:
    """Who has not measured it counts as being like the others, so that newcomers get work."""
    known = measured[measured > 0]
    return np.where(measured > 0, measured, known.mean() if known.size else prior)
