"""What decode and prefill workers say to each other, and the memory they share while they do.

    decode worker                                prefill worker
        --- prefill(PrefillAsk) --------------------->   queued; says Alive now and then
        <-- Begin ------------------------------------   its turn has come
        --- Granted(lease, start, blocks) ----------->   computes chunk after chunk in these blocks
        <-- Wrote(tokens) / More(tokens) --------------   ... and asks for the next chunk's blocks meanwhile
        --- Granted ---------------------------------->
        <-- Done(first token) -------------------------   nothing will be written any more
    commits: the blocks are the sequence's

Whatever goes wrong, the decode worker aborts the lease and prefills elsewhere. The aborted blocks wait in quarantine
until the prefill worker answered `settle`, which it does once it is not writing them, or is gone (`Lender`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from penstock.blocks import BlockId
from penstock.errors import PenstockError
from penstock.kv.lease import Lease, LeaseTable
from penstock.request import Hop, Sampling, Token
from penstock.serve.rpc import Endpoint
from penstock.transport.api import Exported, Offer

log = logging.getLogger(__name__)


class PrefillAsk(msgspec.Struct, frozen=True):
    """Compute this prompt in the region on offer, and sample the token after it.

    `writer` is the incarnation that is meant: whoever got its address since must not write. It says Alive every
    `alive_s`, which is what renews a lease during a long chunk.
    """

    request: str
    tokens: list[int]
    sampling: Sampling
    offer: Offer
    writer: str
    alive_s: float


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """The prefill worker lives; `steps` is its progress counter."""

    steps: int


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """Lend me blocks for the first `chunk_tokens` tokens that your cache lacks."""

    chunk_tokens: int


class More(msgspec.Struct, frozen=True, tag="more"):
    """Let the block table hold `tokens` tokens."""

    tokens: int


class Wrote(msgspec.Struct, frozen=True, tag="wrote"):
    """KV of the first `tokens` tokens is in place."""

    tokens: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    """All of the prompt's KV is in place. `ended_s` is read on the clock that both share, being on one host."""

    token: Token
    computed_tokens: int
    started_s: float
    ended_s: float


FromPrefill = Alive | Begin | More | Wrote | Done


class Granted(msgspec.Struct, frozen=True, tag="granted"):
    """The block table so far. Tokens before `start` are computed; from there on the blocks are the writer's."""

    lease: int
    start: int
    blocks: list[BlockId]


class NoRoom(msgspec.Struct, frozen=True, tag="no_room"):
    """The decode worker is short of blocks: drop the job."""


FromDecode = Granted | NoRoom


class SettleAsk(msgspec.Struct, frozen=True):
    """Answer once `writer` is not writing for this request in the region of `owner`, and never will.

    It names the request and not the lease: a Granted may still be on its way, on another connection.
    """

    writer: str
    request: str
    owner: str
    epoch: int


decode_prefill_ask = msgspec.msgpack.Decoder(PrefillAsk).decode
decode_from_prefill = msgspec.msgpack.Decoder(FromPrefill).decode
decode_from_decode = msgspec.msgpack.Decoder(FromDecode).decode
decode_settle_ask = msgspec.msgpack.Decoder(SettleAsk).decode
_decode_nothing = msgspec.msgpack.Decoder(None).decode


class Lender:
    """Gets aborted blocks back: asks the writer to confirm, waits for its death, and kills it if it is stuck."""

    def __init__(
        self,
        leases: LeaseTable,
        exported: Exported,
        endpoint: Endpoint,
        settle_retry_s: float,
        kill_after_s: float,
        on_blocks_freed: Callable[[], None],
    ) -> None:
        self._leases = leases
        self._exported = exported
        self._endpoint = endpoint
        self._settle_retry_s = settle_retry_s
        self._kill_after_s = kill_after_s
        self._on_blocks_freed = on_blocks_freed

    def abort(self, lease: Lease, hop: Hop, request: str) -> None:
        """Nothing written under `lease` counts any more; its blocks come back when that is safe. Called once."""
        self._leases.abort(lease.id)
        if lease.blocks:
            self._endpoint.spawn(self._reclaim(lease, hop, request))

    async def _reclaim(self, lease: Lease, hop: Hop, request: str) -> None:
        asking = asyncio.ensure_future(self._ask_until_settled(lease, hop, request))
        gone = asyncio.ensure_future(self._exported.wait_gone(lease.writer))
        try:
            done, _ = await asyncio.wait(
                (asking, gone), timeout=self._kill_after_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                log.warning(
                    "%s neither confirmed nor died %.0f s after lease %d was aborted; killing it",
                    *(lease.writer, self._kill_after_s, lease.id),
                )
                self._exported.kill(lease.writer)
                done, _ = await asyncio.wait((asking, gone), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # what raises proves nothing
        finally:
            asking.cancel()
            gone.cancel()
        self._leases.settle(lease.id)
        self._on_blocks_freed()

    async def _ask_until_settled(self, lease: Lease, hop: Hop, request: str) -> None:
        region = self._exported.region
        ask = SettleAsk(lease.writer, request, region.owner, region.epoch)
        while True:
            try:
                async with asyncio.timeout(self._kill_after_s):
                    peer = await self._endpoint.peer(hop.addresses)
                    async with peer.call("settle", ask) as call:
                        await call.receive(_decode_nothing)
                return
            except (PenstockError, TimeoutError) as error:
                log.info("lease %d is not settled yet by %s: %s", lease.id, lease.writer, error)
            await asyncio.sleep(self._settle_retry_s)
