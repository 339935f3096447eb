"""Requests that wait to be routed, in an order that is fair to tenants.

Classes of priority are served strictly one before the other. Within a class tenants get prompt tokens in proportion to
their weights: self-clocked fair queueing (Golestani, INFOCOM 1994). A tenant's next request has the tag

    since + tokens / weight

where `since` is the tag of its request before that or, if nothing of it was waiting, the class's virtual time: the tag
of whatever was served last. The least tag is next. Between any two moments at which two tenants both wait, what they
got per weight differs by no more than one largest request of each; and as every request served moves virtual time on,
whoever waits in the most urgent class is served. A tenant of which nothing waits is forgotten, and owes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """One request. The lowest `priority` is served first; requests of one `lane` can go to the same workers."""

    tenant: str
    priority: int
    tokens: int  # to compute
    lane: Hashable


@dataclass(slots=True, eq=False)
class _Tenant:
    """What waits of one tenant in one class, in order of arrival."""

    weight: float
    since: float
    latest: int = 0  # number of its last arrival
    waiting: dict[Waiting, None] = field(default_factory=dict)

    def tag(self, one: Waiting) -> float:
        return self.since + one.tokens / self.weight

    def tokens(self, lane: Hashable) -> int:
        return sum(one.tokens for one in self.waiting if one.lane == lane)


@dataclass(slots=True, eq=False)
class _Class:
    """One priority. Exists while something of it waits."""

    virtual: float = 0.0
    tenants: dict[str, _Tenant] = field(default_factory=dict)


class FairQueue:
    """Owned by one router. Weights are those of tenants that have one other than 1; they are positive."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._classes: dict[int, _Class] = {}
        self._length = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return self._length

    def put(self, one: Waiting) -> None:
        """`one` waits from now on."""
        level = self._classes.setdefault(one.priority, _Class())
        if (tenant := level.tenants.get(one.tenant)) is None:
            tenant = level.tenants[one.tenant] = _Tenant(self._weight(one.tenant), level.virtual)
        self._arrivals += 1
        self._length += 1
        tenant.latest = self._arrivals
        tenant.waiting[one] = None

    def find_next(self, blocked: Collection[Hashable] = ()) -> Waiting | None:
        """Whose turn it is among those whose lane is not blocked. Stays in the queue."""
        for priority in sorted(self._classes):
            found: Waiting | None = None
            least = 0.0
            for tenant in self._classes[priority].tenants.values():
                first = next((one for one in tenant.waiting if one.lane not in blocked), None)
                if first is not None and (found is None or tenant.tag(first) < least):
                    found, least = first, tenant.tag(first)
            if found is not None:
                return found
        return None

    def serve(self, one: Waiting) -> None:
        """`one` is served, at its tenant's expense. Raises KeyError if it does not wait."""
        level = self._classes[one.priority]
        tenant = level.tenants[one.tenant]
        tenant.since = tenant.tag(one)
        level.virtual = max(level.virtual, tenant.since)
        self._drop(one)

    def remove(self, one: Waiting) -> None:
        """`one` waits no more, and nobody pays for it. Idempotent."""
        level = self._classes.get(one.priority)
        if level is not None and one.tenant in level.tenants and one in level.tenants[one.tenant].waiting:
            self._drop(one)

    def find_victim(self) -> Waiting | None:
        """Who should leave if somebody must: in the least urgent class the newest of who has most there per weight."""
        if not self._classes:
            return None
        tenants = self._classes[max(self._classes)].tenants.values()
        longest = max(tenants, key=lambda tenant: (len(tenant.waiting) / tenant.weight, tenant.latest))
        return next(reversed(longest.waiting))

    def has_rivals(self, one: Waiting) -> bool:
        """Whether other tenants wait in the class of `one`."""
        level = self._classes.get(one.priority)
        return level is not None and any(name != one.tenant for name in level.tenants)

    def tokens_ahead(self, one: Waiting) -> float:
        """What is served before `one`, which does not wait yet, if nobody comes after it; at most, of its lane alone.

        Lanes that share some workers delay each other too; by how much depends on what the others choose.
        """
        sooner = [self._classes[priority] for priority in self._classes if priority < one.priority]
        ahead = float(sum(tenant.tokens(one.lane) for level in sooner for tenant in level.tenants.values()))
        if (level := self._classes.get(one.priority)) is None:
            return ahead
        tokens = {name: tenant.tokens(one.lane) for name, tenant in level.tenants.items()}
        own = tokens.pop(one.tenant, 0)
        turn = (own + one.tokens) / self._weight(one.tenant)
        return ahead + own + sum(min(other, turn * self._weight(name)) for name, other in tokens.items())

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def _drop(self, one: Waiting) -> None:
        level = self._classes[one.priority]
        tenant = level.tenants[one.tenant]
        del tenant.waiting[one]
        self._length -= 1
        if not tenant.waiting:
            del level.tenants[one.tenant]
        if not level.tenants:
            del self._classes[one.priority]
