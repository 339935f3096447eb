"""Blocks come back when it is proven that nobody writes them, and not because asking went wrong."""

from __future__ import annotations

import asyncio
import logging

import pytest

from penstock.blocks import KvLayout, Region
from penstock.errors import StaleEpoch
from penstock.kv.lease import LeaseTable
from penstock.kv.prefix_cache import PrefixCache
from penstock.request import Hop, Sampling
from penstock.serve.handoff import PrefillAsk, SettleAsk
from penstock.serve.lend import LendOptions, Reclaimer
from penstock.serve.paths import Shared
from penstock.serve.rpc import Call, Endpoint
from penstock.sim.loop import run_virtual
from penstock.sim.world import World
from penstock.tokens import pack
from penstock.transport.api import Limits, Offer
from penstock.wire.memory import MemoryNetwork

LAYOUT = KvLayout(1, 1, 1, 16, "uint64")


class Exported:
    """A region of which it is hard to tell who writes it."""

    region = Region("d", 1, LAYOUT, 8, None)
    offer = Offer("memory", "d", 1, "d", LAYOUT, 8)

    async def fence(self, writer: str, request: str) -> None:
        await asyncio.sleep(2)
        raise OSError("too many open files")

    def kill(self, writer: str) -> None:
        raise AssertionError("nobody is to be killed")


def test_a_question_that_fails_is_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        cache = PrefixCache(8)
        leases = LeaseTable(cache, lease_s=5.0)
        async with Endpoint({"memory": MemoryNetwork().wire("d")}, "", {}) as endpoint:
            shared = Shared(Exported.region, {"memory": Exported()}, {"memory": Limits(is_in_place=True)})
            reclaimer = Reclaimer(leases, shared, endpoint, LendOptions(), lambda: None)
            lease = leases.open(0.0, "p:1", 3)
            leases.grow(0.0, lease.id, 3)
            reclaimer.abort(lease, Hop("p", 1, ("memory:p",)), "r1", "")
            await asyncio.sleep(20)
            assert (cache.quarantined, cache.available) == (3, 5)

    with caplog.at_level(logging.ERROR):
        run_virtual(story())
    assert "too many open files" in caplog.text


def test_a_worker_takes_neither_prompts_nor_questions_meant_for_another_incarnation() -> None:
    async def read(call: Call) -> None:
        await call.receive(lambda raw: raw)

    async def story() -> None:
        async with World(seed=1) as world:
            offer = Offer("memory", "decode-0", 1, "decode-0", world.workers["decode-0"].member.layout, 1024)
            prefill = PrefillAsk("r", pack([1, 2]), Sampling(1), (offer,), writer="prefill-0:7", alive_s=1.0)
            settle = SettleAsk("prefill-0:7", "r", "decode-0", 1)
            peer = await world.router.endpoint.peer(world.workers["prefill-0"].member.addresses)
            for method, ask in (("prefill", prefill), ("settle", settle)):
                async with peer.call(method, ask) as call:
                    with pytest.raises(StaleEpoch, match="this is prefill-0:1, not prefill-0:7"):
                        await read(call)

    run_virtual(story())
