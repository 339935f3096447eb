"""The port of discovery: who is there, told by leases that must be renewed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from penstock.cluster import Member, Standing


class Announcement(Protocol):
    """One's own entry."""

    async def renew(self, standing: Standing) -> None:
        """Says again that we are here, and how we are. Must happen more often than the ttl. Raises WireError."""
        ...


class Discovery(Protocol):
    """Members appear when announced and vanish when they leave or have been silent for `ttl_s`."""

    ttl_s: float

    def announce(self, member: Member) -> AbstractAsyncContextManager[Announcement]:
        """Our entry, while inside the block. A newer epoch of a name replaces the older at once."""
        ...

    def watch(self) -> AsyncIterator[dict[str, Standing]]:
        """All live members by worker name, now and after every change. Slow readers see the latest state only."""
        ...
