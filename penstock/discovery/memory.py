"""Discovery inside one process: a frontend's list of the workers that joined it, and what simulations use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from penstock.cluster import Member, Standing


@dataclass(slots=True, eq=False)
class _Lease:
    """What was said last of a worker; it belongs to the announcement that said it."""

    standing: Standing
    expiry: asyncio.TimerHandle | None = None


class MemoryDiscovery:
    """Leases in a dict; each expires by a timer of the running loop."""

    def __init__(self, ttl_s: float = 6.0) -> None:
        self.ttl_s = ttl_s
        self._leases: dict[str, _Lease] = {}
        self._changed = asyncio.Event()  # set at the next change, then replaced

    @asynccontextmanager
    async def announce(self, member: Member) -> AsyncIterator[MemoryAnnouncement]:
        """Leaving takes the entry away, unless another announcement of the same incarnation has renewed it since."""
        announcement = MemoryAnnouncement(self)
        await announcement.renew(Standing(member))
        try:
            yield announcement
        finally:
            announcement.leave()

    async def watch(self) -> AsyncIterator[dict[str, Standing]]:
        while True:
            changed = self._changed
            yield {worker: lease.standing for worker, lease in self._leases.items()}
            await changed.wait()

    def _put(self, standing: Standing) -> _Lease:
        member, lease = standing.member, _Lease(standing)
        current = self._leases.get(member.worker)
        if current is not None and current.standing.member.epoch > member.epoch:
            return lease  # of an earlier incarnation that does not know yet that it was replaced
        if current is not None and current.expiry is not None:
            current.expiry.cancel()
        lease.expiry = asyncio.get_running_loop().call_later(self.ttl_s, self._drop, lease)
        self._leases[member.worker] = lease
        self._tell()
        return lease

    def _drop(self, lease: _Lease) -> None:
        """Takes out the entry, unless another one has taken its place."""
        worker = lease.standing.member.worker
        if self._leases.get(worker) is not lease:
            return
        if lease.expiry is not None:
            lease.expiry.cancel()
        del self._leases[worker]
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class MemoryAnnouncement:
    """An entry in a MemoryDiscovery."""

    def __init__(self, discovery: MemoryDiscovery) -> None:
        self._discovery = discovery
        self._lease: _Lease | None = None

    async def renew(self, standing: Standing) -> None:
        self._lease = self._discovery._put(standing)

    def leave(self) -> None:
        if self._lease is not None:
            self._discovery._drop(self._lease)
