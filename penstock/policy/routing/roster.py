"""One model's workers as a router knows them: their reports, what it booked there, what they are believed to hold.

The columns of a `Fleet` are kept here: laid out anew when workers come, leave or change, else written in place.
"""

from __future__ import annotations

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
    Wiring,
)
from penstock.request import Request

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
        self._measured: Floats = np.zeros((2, 0))
        self._load: Floats = np.zeros((REPORTED, 0))  # what the fleet shows
        self._fleet: Fleet | None = None  # None: nobody is there
        self._masked: tuple[tuple[str, ...], Fleet | None] = ((), None)
        self._booked = 0

    def update(self, standings: Mapping[str, Standing]) -> None:
        """These workers serve the model now. Those that drain take no requests, so they are left out."""
        ready = [standing for standing in standings.values() if not standing.draining]
        members = [standing.member for standing in ready]
        if members != self._members:
            self._seat(members)
        if self._fleet is None:
            return
        for column, standing in enumerate(ready):
            if standing.load is not self._loads[column]:
                self._loads[column] = load = standing.load
                used = load.blocks - load.free_blocks
                self._reported[:, column] = load.queued_tokens, load.waiting, load.running, used
                self._measured[:, column] = load.prefill_tokens_per_s, load.decode_step_s
        self._fleet.prefill_tokens_per_s[:] = _with_prior(self._measured[0], PRIOR_TOKENS_PER_S)
        self._fleet.decode_step_s[:] = _with_prior(self._measured[1], PRIOR_STEP_S)

    def fleet(self, tried: Collection[str] = (), avoided: Collection[str] = ()) -> Fleet:
        """Up to date, without those that were tried; without the avoided too, unless nobody else is left.

        Raises NoWorker if nobody is left at all.
        """
        fleet = self._fleet
        if fleet is not None and (tried or avoided):
            fleet = self._without((*tried, "", *avoided), tried, avoided)
        if fleet is None:
            raise NoWorker("no worker takes requests now; start one with `penstock worker --join HOST:PORT`")
        np.maximum(self._reported, self.ledger.booked[:REPORTED], out=self._load)
        return fleet

    def index(self, worker: Incarnation) -> PrefixIndex | None:
        """Where KV events of this worker belong; None if it is not there."""
        return self._prefixes.index(worker)

    def ask(self, request: Request) -> tuple[Ask, Found]:
        """What a policy is asked, and what was found of the prompt."""
        found = self._prefixes.find(request)
        token_bytes = self._members[0].layout.token_bytes
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

    def book(self, request_id: str, ask: Ask, found: Found, choice: Choice) -> None:
        """`choice` is being carried out: its load is counted, and its prompt believed to be where it will be."""
        self._booked += 1
        decode = self._columns[choice.decode]
        prefill = self._columns[choice.prefill[0]] if choice.prefill else decode
        is_moved = not (prefill == decode or self._shares_memory(prefill, decode))
        computed_by = prefill if is_moved else decode
        self.ledger.book(
            request_id,
            Booking(
                decode=choice.decode,
                prefill=self._members[prefill].worker,
                tokens=int(ask.uncached_tokens[computed_by]),
                blocks=self._members[decode].layout.blocks_for(
                    ask.prompt_tokens + min(ask.max_tokens, EXPECTED_OUTPUT_TOKENS)
                ),
                move_bytes=int(ask.uncached_tokens[decode]) * ask.token_bytes if is_moved else 0,
            ),
        )
        for column in (prefill, decode) if is_moved else (decode,):
            self._prefixes.learn(request_id, self._ids[column], found)

    def prefilled(self, request_id: str, now: float) -> None:
        """The request's first token came. Idempotent."""
        self.ledger.prefilled(request_id)
        self._prefixes.end(request_id, now)

    def release(self, request_id: str, now: float) -> None:
        """The request is over, or on no worker any more. Idempotent."""
        self.ledger.release(request_id)
        self._prefixes.end(request_id, now)

    def _shares_memory(self, one: int, other: int) -> bool:
        fleet = self.fleet()
        return bool(fleet.memory[one] >= 0 and fleet.memory[one] == fleet.memory[other])

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
        self._measured = np.zeros((2, len(members)))
        self._masked = ((), None)
        self.ledger.seat(names)
        self._prefixes.seat(members)
        self._fleet = self._lay_out(names) if members else None

    def _lay_out(self, names: Sequence[str]) -> Fleet:
        members, load, booked = self._members, self._load, self.ledger.booked
        return Fleet(
            names=names,
            prefers_prefill=np.array([member.role != "decode" for member in members]),
            prefers_decode=np.array([member.role != "prefill" for member in members]),
            memory=_numbered([member.memory and (member.memory, member.layout) for member in members]),
            network=_numbered([member.domain and (member.domain, member.layout) for member in members]),
            devices=[member.device for member in members],
            queued_tokens=load[0],
            prefills=load[1],
            streams=load[2],
            used_blocks=load[3],
            blocks=np.array([float(member.blocks) for member in members]),
            block_tokens=np.array([float(member.layout.block_tokens) for member in members]),
            prefill_tokens_per_s=np.full(len(members), PRIOR_TOKENS_PER_S),
            decode_step_s=np.full(len(members), PRIOR_STEP_S),
            outgoing_bytes=booked[OUTGOING_BYTES],
            incoming_bytes=booked[INCOMING_BYTES],
            wiring=self._wiring,
        ).only(np.full(len(members), True))


def _numbered(domains: Sequence[Hashable]) -> Indices:
    """Equal numbers for equal domains; -1 for none."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(domain, len(numbers)) if domain else -1 for domain in domains], np.intp)


def _with_prior(measured: Floats, prior: float) -> Floats:
    """Who has not measured it counts as being like the others, so that newcomers get work."""
    known = measured[measured > 0]
    return np.where(measured > 0, measured, known.mean() if known.size else prior)
