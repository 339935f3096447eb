"""Discovery inside one process: a frontend's list of the workers that joined it, and what simulations use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from penstock.cluster import Member, Standing


@dataclass(frozen=True, slots=True)
class _Lease:
    standing: Standing
    expiry: asyncio.TimerHandle


class MemoryDiscovery:
    """Leases in a dict; each expires by a timer of the running loop."""

    def __init__(self, ttl_s: float = 6.0) -> None:
        self.ttl_s = ttl_s
        self._leases: dict[str, _Lease] = {}
        self._changed = asyncio.Event()  # set at the next change, then replaced

    @asynccontextmanager
    async def announce(self, member: Member) -> AsyncIterator[MemoryAnnouncement]:
        self._put(Standing(member))
        try:
            yield MemoryAnnouncement(self)
        finally:
            self._drop(member)

    async def watch(self) -> AsyncIterator[dict[str, Standing]]:
        while True:
            changed = self._changed
            yield {worker: lease.standing for worker, lease in self._leases.items()}
            await changed.wait()

    def _put(self, standing: Standing) -> None:
        member = standing.member
        current = self._leases.get(member.worker)
        if current is not None and current.standing.member.epoch > member.epoch:
            return  # an earlier incarnation that does not know yet that it was replaced
        if current is not None:
            current.expiry.cancel()
        expiry = asyncio.get_running_loop().call_later(self.ttl_s, self._drop, member)
        self._leases[member.worker] = _Lease(standing, expiry)
        self._tell()

    def _drop(self, member: Member) -> None:
        """Takes out the entry of this incarnation, unless another one has taken its place."""
        current = self._leases.get(member.worker)
        if current is None or current.standing.member.epoch != member.epoch:
            return
        current.expiry.cancel()
        del self._leases[member.worker]
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class MemoryAnnouncement:
    """An entry in a MemoryDiscovery."""

    def __init__(self, discovery: MemoryDiscovery) -> None:
        self._discovery = discovery

    async def renew(self, standing: Standing) -> None:
        self._discovery._put(standing)
