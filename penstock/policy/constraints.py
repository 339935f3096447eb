"""Which workers a request may go to, and which it should: labels, adapters, and the worker that had its session last.

What is required narrows the fleet. What is preferred is a matter of price: a policy is asked twice, for anybody and for
the preferred ones, and they are kept to while that costs at most so many seconds more. So affinity yields under load.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from random import Random

import numpy as np

from penstock.cluster import Member, Standing
from penstock.errors import NoWorker
from penstock.policy.forecast import price_s
from penstock.policy.routing.api import Ask, Choice, Fleet, Mask, Route
from penstock.request import Constraints, Label, Request

ANYWHERE = Constraints()
KEPT_SESSIONS = 1 << 16


class Steering:
    """Owned by one router: the labels of its workers and their sessions. `standings` are its workers by name."""

    def __init__(self, extra_s: float) -> None:
        self._extra_s = extra_s
        self._sessions = Sessions()
        self._labelled: dict[str, Labelled] = {}  # by model

    def narrowed(self, request: Request, fleet: Fleet, standings: Mapping[str, Standing]) -> Fleet:
        """Those of `fleet` that have what the request requires. Raises NoWorker."""
        wanted = request.constraints
        if not wanted.require and not wanted.adapter:
            return fleet
        labelled = self._labels_of(request.model, fleet, standings)
        usable = fleet.usable & labelled.having(wanted.require) & labelled.with_adapter(wanted.adapter)
        if usable.any():
            return fleet.only(usable)
        required = [f"{name}={value}" for name, value in wanted.require]
        required += [f"the adapter {wanted.adapter}"] if wanted.adapter else []
        there = f"the labels there are: {labelled.described()}"
        raise NoWorker(f"no worker with {', '.join(required)} takes requests now; {there}")

    def keeping(self, route: Route, request: Request, fleet: Fleet, standings: Mapping[str, Standing]) -> Route:
        """`route`, kept to what the request prefers of `fleet`."""
        wanted, wishes = request.constraints, list[Mask]()
        if wanted.session and (stay := self._staying(request, fleet, standings)) is not None:
            wishes.append(stay)
        if wanted.prefer:
            wishes += closest_first(self._labels_of(request.model, fleet, standings), wanted.prefer)
        return keeping(route, wishes, self._extra_s) if wishes else route

    def note(self, request: Request, decode: Member) -> None:
        """The request was sent there."""
        if request.constraints.session:
            self._sessions.note(_session(request), (decode.worker, decode.epoch))

    def forget(self, model: str) -> None:
        """Nobody serves it any more. Idempotent."""
        self._labelled.pop(model, None)

    def _staying(self, request: Request, fleet: Fleet, standings: Mapping[str, Standing]) -> Mask | None:
        worker, epoch = self._sessions.find(_session(request)) or ("", 0)
        standing = standings.get(worker)
        if standing is None or standing.member.epoch != epoch:
            return None
        return staying_at(fleet, worker)

    def _labels_of(self, model: str, fleet: Fleet, standings: Mapping[str, Standing]) -> Labelled:
        labelled = self._labelled.get(model)
        if labelled is None or labelled.names is not fleet.names:
            members = [standings[name].member for name in fleet.names]
            labelled = self._labelled[model] = Labelled(fleet.names, members)
        return labelled


class Labelled:
    """Who of one model's workers has which labels and adapters, as masks in the order of `names`."""

    def __init__(self, names: Sequence[str], members: Sequence[Member]) -> None:
        self.names = names
        self._none = np.full(len(members), False)
        self._labels: dict[Label, Mask] = {}
        self._adapters: dict[str, Mask] = {}
        for column, member in enumerate(members):
            for label in member.labels.items():
                self._labels.setdefault(label, self._none.copy())[column] = True
            for adapter in member.adapters:
                self._adapters.setdefault(adapter, self._none.copy())[column] = True

    def having(self, labels: Iterable[Label]) -> Mask:
        """Those that have all of `labels`."""
        found = ~self._none
        for label in labels:
            found &= self._labels.get(label, self._none)
        return found

    def with_adapter(self, adapter: str) -> Mask:
        """Those that have it; everybody, if it is empty."""
        return self._adapters.get(adapter, self._none) if adapter else ~self._none

    def described(self) -> str:
        """The labels there are, for people."""
        return ", ".join(f"{name}={value}" for name, value in sorted(self._labels)) or "none"


class Sessions:
    """Which incarnation of a worker had each session last. Owned by one router; bounded by forgetting the oldest."""

    def __init__(self, capacity: int = KEPT_SESSIONS) -> None:
        self._capacity = capacity
        self._workers: OrderedDict[tuple[str, ...], tuple[str, int]] = OrderedDict()

    def find(self, session: tuple[str, ...]) -> tuple[str, int] | None:
        """Its name and epoch."""
        return self._workers.get(session)

    def note(self, session: tuple[str, ...], worker: tuple[str, int]) -> None:
        """The session is there now."""
        self._workers[session] = worker
        self._workers.move_to_end(session)
        if len(self._workers) > self._capacity:
            self._workers.popitem(last=False)


def staying_at(fleet: Fleet, worker: str) -> Mask | None:
    """A wish to decode at `worker`, wherever the prompt is computed; None if it cannot be chosen."""
    if worker not in fleet.names or not fleet.usable[column := fleet.names.index(worker)]:
        return None
    wish = fleet.prefers_prefill & ~fleet.prefers_decode
    wish[column] = True
    return wish


def closest_first(labelled: Labelled, labels: Sequence[Label]) -> list[Mask]:
    """Wishes for workers with all of `labels`, then without the last one, and so on; the first matters most."""
    return [labelled.having(labels[:count]) for count in range(len(labels), 0, -1)]


def keeping(route: Route, wishes: Sequence[Mask], extra_s: float) -> Route:
    """`route`, kept to the first of `wishes` that costs at most `extra_s` more than the choice among all."""

    def keep(now: float, ask: Ask, fleet: Fleet, rng: Random) -> Choice:
        best = route(now, ask, fleet, rng)
        best_s = price_s(ask, fleet, best)
        for wish in wishes:
            if _is_granted(fleet, wish, best):
                return best
            usable = fleet.usable & wish
            if not usable.any():
                continue
            kept = route(now, ask, fleet.only(usable), rng)
            more_s = price_s(ask, fleet, kept) - best_s
            if more_s <= extra_s:
                return replace(kept, why=f"{kept.why}; preferred, for {more_s:.4f} s more than {best.decode}")
        return best

    return keep


def _is_granted(fleet: Fleet, wish: Mask, choice: Choice) -> bool:
    return all(wish[fleet.names.index(worker)] for worker in (choice.decode, *choice.prefill[:1]))


def _session(request: Request) -> tuple[str, str, str]:
    return request.model, request.constraints.tenant, request.constraints.session
