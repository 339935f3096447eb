"""The registry: workers join a frontend with one call and report through it; no other service is needed.

worker --- join(Member) ------------>  frontend: announces it in its own discovery
       --- Report, every `report_s` -->  renews it
       <-- Seen, for each -------------  so that the worker knows that the frontend lives
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager

import msgspec

from penstock.cluster import Load, Member, Role, Standing
from penstock.discovery.api import Discovery
from penstock.errors import PenstockError, WireError
from penstock.serve.rpc import Call, Endpoint

log = logging.getLogger(__name__)


class Report(msgspec.Struct, frozen=True):
    """A worker's state."""

    role: Role  # it may change while the worker lives
    load: Load
    draining: bool


decode_member = msgspec.msgpack.Decoder(Member).decode
_decode_report = msgspec.msgpack.Decoder(Report).decode
_decode_seen = msgspec.msgpack.Decoder(bool).decode


async def stay_announced(discovery: Discovery, standing: Callable[[], Standing], report_s: float) -> None:
    """Announces in a discovery that frontends watch, and reports there until cancelled.

    Raises what the first announcement raises; a later report that fails is made again.
    """
    async with discovery.announce(standing().member) as announcement:
        while True:
            try:
                await announcement.renew(standing())
            except WireError as error:
                log.warning("this report was not heard, trying again in %.1f s: %s", report_s, error)
            await asyncio.sleep(report_s)


Tell = Callable[[Member], AbstractAsyncContextManager[Callable[[Standing], None]]]


@asynccontextmanager
async def tell_nobody(member: Member) -> AsyncIterator[Callable[[Standing], None]]:
    yield lambda standing: None


class Registry:
    """Serves `join` and `members` in a frontend. Others are told by `tell` who joined and what they report."""

    def __init__(self, discovery: Discovery, tell: Tell = tell_nobody) -> None:
        self._discovery = discovery
        self._tell = tell

    async def members(self, call: Call) -> None:
        """Answers with those that are there now."""
        async with aclosing(self._discovery.watch()) as fleets:  # type: ignore[type-var]
            call.send([standing.member for standing in (await anext(fleets)).values()])

    async def join(self, call: Call) -> None:
        """Lists the caller for as long as the call lasts; its reports keep the entry alive."""
        member = decode_member(call.body)
        log.info("%s (epoch %d, %s) joined from %s", member.worker, member.epoch, member.role, call.peer_name)
        try:
            async with self._discovery.announce(member) as announcement, self._tell(member) as tell:
                while (standing := await heard(call, member)) is not None:
                    await announcement.renew(standing)
                    tell(standing)
        finally:
            log.info("%s (epoch %d) left", member.worker, member.epoch)


async def heard(call: Call, member: Member) -> Standing | None:
    """The next report on a worker's call, and an answer to it; None at the end. Raises what the call ends with."""
    report = await call.receive(_decode_report)
    if report is None:
        return None
    call.send(True)
    return Standing(msgspec.structs.replace(member, role=report.role), report.load, report.draining)


async def report(call: Call, standing: Standing) -> None:
    """The other side of that: returns once the report has been heard. Raises what the call ends with."""
    call.send(Report(standing.member.role, standing.load, standing.draining))
    await call.receive(_decode_seen)


async def stay_joined(
    endpoint: Endpoint, addresses: Sequence[str], standing: Callable[[], Standing], report_s: float
) -> None:
    """Joins the frontend at `addresses` and reports until cancelled; joins again whenever it is lost."""
    retry_s = 0.1
    while True:
        try:
            peer = await endpoint.peer(addresses)
            member = standing().member
            async with peer.call("join", member) as call:
                while True:
                    await report(call, standing())
                    retry_s = 0.1
                    await asyncio.sleep(report_s)
        except PenstockError as error:
            log.warning("no frontend at %s: %s; trying again in %.1f s", " ".join(addresses), error, retry_s)
        await asyncio.sleep(retry_s)
        retry_s = min(5.0, retry_s * 2)
