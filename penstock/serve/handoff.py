"""What decode and prefill workers say to each other.

    decode worker                                prefill worker
        --- prefill(PrefillAsk) --------------------->   queued; says Alive now and then
        <-- Begin ------------------------------------   its turn has come
        --- Granted(lease, start, blocks) ----------->   fills these blocks, chunk after chunk
        <-- Wrote(tokens) / More(tokens) --------------   ... and asks for the next chunk's blocks meanwhile
        --- Granted ---------------------------------->
        <-- First(token) ------------------------------   the prompt is computed: the client gets its first token
        <-- Done --------------------------------------   nothing will be written any more
    commits: the blocks are the sequence's

Where both reach the same memory the prefill worker computes in the granted blocks, so First and Done come together.
Else it computes in blocks of its own and has each finished one written through, while it computes the next.

Whatever goes wrong, the decode worker aborts the lease and prefills elsewhere. The aborted blocks wait in quarantine
until the prefill worker answered `settle`, which it does once it is not writing them, or is gone; see `lend`.
"""

from __future__ import annotations

import msgspec

from penstock.blocks import BlockId
from penstock.request import Sampling, Token
from penstock.transport.api import Offer


class PrefillAsk(msgspec.Struct, frozen=True):
    """Compute this prompt in the region on offer, and sample the token after it.

    `writer` is the incarnation that is meant: whoever got its address since must not write. It says Alive every
    `alive_s`, which is what renews a lease during a long chunk.
    """

    request: str
    tokens: bytes  # packed
    sampling: Sampling
    offer: Offer
    writer: str
    alive_s: float
    salt: str = ""


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
    """KV of the first `tokens` tokens is in place, or on its way."""

    tokens: int


class First(msgspec.Struct, frozen=True, tag="first"):
    """The token after the prompt. It binds whoever goes on, even if the KV never arrives."""

    token: Token


class Done(msgspec.Struct, frozen=True, tag="done"):
    """All of the prompt's KV is in place. Times are seconds before this was sent, since clocks of hosts differ."""

    computed_tokens: int
    started_ago_s: float
    ended_ago_s: float  # of the last chunk's computation
    moved_bytes: int = 0  # that were copied


FromPrefill = Alive | Begin | More | Wrote | First | Done


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
