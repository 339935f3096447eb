"""Frontend processes that share a port: what one of them knows, all can tell. Used by `frontend` and the registry.

    worker --- join, reports --->  one of them  --- relay: the same --->  each of the others
    client --- GET /metrics, ... ->  one of them  --- ask: what do you have? --->  each of the others

Each has a router of its own, with its own connections to all workers, so that no token passes two of them. A worker
joins whichever accepts its connection. If that one dies, the worker joins another within a second; until then the
others go on listing it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import TypeVar

import msgspec

from penstock.cluster import Member, Standing
from penstock.discovery.api import Discovery
from penstock.errors import PenstockError
from penstock.metrics import Told
from penstock.serve.registry import decode_member, heard, report
from penstock.serve.rpc import Call, Endpoint

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_S = 0.1
REJOIN_S = 3.0  # for a worker to join another process, once the one that it had joined is gone
ASK_S = 1.0  # for an answer; who is busier than that is left out

_decode_told = msgspec.msgpack.Decoder(Told).decode
_decode_members = msgspec.msgpack.Decoder(list[Member]).decode
_decode_record = msgspec.msgpack.Decoder(bytes | None).decode
_decode_heads = msgspec.msgpack.Decoder(list[dict[str, object]]).decode


class Siblings:
    """The other processes. `others` are their addresses by name, `own` is this one's name."""

    def __init__(self, own: str, others: Mapping[str, str], endpoint: Endpoint, discovery: Discovery) -> None:
        self.own = own
        self._others = others
        self._endpoint = endpoint
        self._discovery = discovery

    @asynccontextmanager
    async def telling(self, member: Member) -> AsyncIterator[Callable[[Standing], None]]:
        """Has the others list a worker while inside the block; what it yields passes on its reports."""
        news = _News(Standing(member))
        tasks = [self._endpoint.spawn(self._tell(address, news)) for address in self._others.values()]
        try:
            yield news.put
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    async def relayed(self, call: Call) -> None:
        """Serves `relay`: lists a worker that joined the caller, as long as that says so, or dies and soon after."""
        member = decode_member(call.body)
        async with AsyncExitStack() as stack:
            announcement = await stack.enter_async_context(self._discovery.announce(member))
            try:
                while (standing := await heard(call, member)) is not None:
                    await announcement.renew(standing)
            except asyncio.CancelledError:
                if call.is_lost:
                    self._endpoint.spawn(_linger(stack.pop_all()))
                raise

    async def wait_caught_up(self) -> None:
        """Returns when the workers that the others list are listed here too, or have had the time for it."""
        told = await self._ask_all("members", None, _decode_members)
        missing = {member.worker for members in told.values() for member in members}
        async with aclosing(self._discovery.watch()) as fleets:  # type: ignore[type-var]
            try:
                async with asyncio.timeout(REJOIN_S):
                    while not missing <= (await anext(fleets)).keys():
                        pass
            except TimeoutError:
                log.warning("%s are not known here yet", ", ".join(sorted(missing)))

    async def metrics(self) -> dict[str, Told]:
        """What the others have counted, by process."""
        return await self._ask_all("counts", None, _decode_told)

    async def find_record(self, name: str) -> bytes | None:
        """A request's record, in JSON, from whoever has it."""
        found = await self._ask_all("record", name, _decode_record)
        return next((record for record in found.values() if record is not None), None)

    async def heads(self) -> list[dict[str, object]]:
        """What tells apart the requests that the others had."""
        return [head for heads in (await self._ask_all("heads", None, _decode_heads)).values() for head in heads]

    async def _tell(self, address: str, news: _News) -> None:
        while True:
            try:
                peer = await self._endpoint.peer((address,))
                async with peer.call("relay", news.latest.member) as call:
                    while True:
                        change = news.change
                        await report(call, news.latest)
                        await change.wait()
            except PenstockError as error:
                log.debug("the process at %s does not hear of %s: %s", address, news.latest.member.worker, error)
            await asyncio.sleep(RETRY_S)

    async def _ask_all(self, method: str, about: object, decode: Callable[[msgspec.Raw], T]) -> dict[str, T]:
        """The answers by process, of those that gave one."""
        asked = [self._ask(name, method, about, decode) for name in self._others]
        answers = zip(self._others, await asyncio.gather(*asked), strict=True)
        return {name: answer for name, answer in answers if answer is not None}

    async def _ask(self, name: str, method: str, about: object, decode: Callable[[msgspec.Raw], T]) -> T | None:
        try:
            async with asyncio.timeout(ASK_S):
                peer = await self._endpoint.peer((self._others[name],))
                async with peer.call(method, about) as call:
                    return await call.receive(decode)
        except (TimeoutError, PenstockError) as error:
            log.debug("%s does not answer: %s", name, error)
            return None


class _News:
    """What a worker said last."""

    def __init__(self, latest: Standing) -> None:
        self.latest = latest
        self.change = asyncio.Event()  # set when there is something newer, then replaced

    def put(self, standing: Standing) -> None:
        self.latest = standing
        self.change.set()
        self.change = asyncio.Event()


async def _linger(entry: AsyncExitStack) -> None:
    async with entry:
        await asyncio.sleep(REJOIN_S)
