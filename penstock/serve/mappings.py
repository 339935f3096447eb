"""Regions of peers, mapped here and attached to the engine, for prefills that compute in place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from penstock.blocks import Region
from penstock.engine.api import Engine
from penstock.errors import StaleEpoch
from penstock.serve.paths import Paths
from penstock.transport.api import Attached, Offer


class Mappings:
    """What is mapped, while somebody uses it or its owner lives."""

    def __init__(self, engine: Engine, paths: Paths, writer: str, active: int) -> None:
        self._engine = engine
        self._paths = paths
        self._writer = writer
        self._active = active
        self._mappings: dict[tuple[str, int], _Mapping] = {}

    @asynccontextmanager
    async def mapped(self, offer: Offer) -> AsyncIterator[Region]:
        """The offered region, to compute in while inside the block; at most `active` are at a time.

        Raises StaleEpoch, Refused or ConnectionLost.
        """
        mapping = self._mappings.get(offer.key)
        if mapping is None:
            mapping = self._mappings[offer.key] = _Mapping(asyncio.Semaphore(self._active))
        mapping.users += 1
        try:
            async with mapping.lock:  # one per region: an owner that does not answer holds up nobody else
                attached = mapping.attached or await self._attach(mapping, offer)
            if attached.is_owner_gone:
                raise StaleEpoch(f"{offer.owner} of epoch {offer.epoch} is gone")
            async with mapping.slots:
                yield attached.region
        finally:
            mapping.users -= 1

    async def release_orphans(self) -> None:
        """Lets go of what nobody uses and whose owner is gone, or never handed it over."""
        for key, mapping in list(self._mappings.items()):
            if mapping.users == 0 and (mapping.attached is None or mapping.attached.is_owner_gone):
                del self._mappings[key]
                await mapping.stack.aclose()

    async def close(self) -> None:
        for mapping in self._mappings.values():
            await mapping.stack.aclose()
        self._mappings.clear()

    async def _attach(self, mapping: _Mapping, offer: Offer) -> Attached:
        async with AsyncExitStack() as stack:
            attached = await stack.enter_async_context(self._paths.attach(offer, self._writer))
            self._engine.attach(attached.region)
            stack.callback(self._engine.detach, attached.region.key)
            mapping.attached, mapping.stack = attached, stack.pop_all()
        return attached


@dataclass(slots=True, eq=False)
class _Mapping:
    """One region. `attached` once its owner handed it over; `stack` lets go of it."""

    slots: asyncio.Semaphore
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    attached: Attached | None = None
    users: int = 0
