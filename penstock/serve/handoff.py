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
Else it computes in blocks of its own and has each finished one written through, while it computes the next. Blocks are
then granted no faster than they arrive, so that many writers do not drown one reader. A prefix that the decode worker
alone holds may be fetched before that, where that is quicker than computing it:

        <-- Fetch ------------------------------------   before its turn comes
    pins what its cache holds
        --- Held(blocks) ----------------------------->   reads them into its own cache
        <-- Fetched ----------------------------------
    lets go of them
        --- Kept ------------------------------------>   only now they are known to be what was held

If the way fails, `Switch` and `Switched` change it, see `paths`. Whatever else goes wrong, the decode worker aborts the
lease and prefills elsewhere. The aborted blocks wait in quarantine until the transfer is fenced off, or the prefill
worker answered `settle`, which it does once it is not writing them, or is gone; see `lend`.
"""

from __future__ import annotations

import msgspec

from penstock.blocks import BlockId
from penstock.request import Sampling, Token
from penstock.transport.api import Offer


class PrefillAsk(msgspec.Struct, frozen=True):
    """Compute this prompt in the region on offer, and sample the token after it.

    `request` names this attempt, and is not used again. `writer` is the incarnation that is meant: whoever got its
    address since must not write. It says Alive every `alive_s`, which is what renews a lease during a long chunk.
    """

    request: str
    tokens: bytes  # packed
    sampling: Sampling
    offers: tuple[Offer, ...]  # of one region
    writer: str
    alive_s: float
    salt: str = ""
    held_tokens: int = 0  # that the asker's cache holds
    output_tokens: int = 0  # so many of the last tokens are output already, of a sequence that continues here

    @property
    def region(self) -> tuple[str, int]:
        """The key of the region on offer."""
        return self.offers[0].key


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """The prefill worker lives; `steps` and `step_s` tell of its engine's progress as in `cluster.Load`."""

    steps: int
    step_s: float = 0.0


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """Lend me blocks for the first `chunk_tokens` tokens that your cache lacks.

    `transfer` is connected and will write them; without a name they are written in place.
    """

    chunk_tokens: int
    transfer: str = ""


class More(msgspec.Struct, frozen=True, tag="more"):
    """Let the block table hold `tokens` tokens."""

    tokens: int


class Wrote(msgspec.Struct, frozen=True, tag="wrote"):
    """KV of the first `tokens` tokens is computed; of the granted blocks that are copied, `moved` are in place."""

    tokens: int
    moved: int = 0


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    """Pin the prefix that your cache holds: I am about to read it."""


class Fetched(msgspec.Struct, frozen=True, tag="fetched"):
    """Read. Has it been pinned all the time?"""


class Switch(msgspec.Struct, frozen=True, tag="switch"):
    """The way failed: take nothing of the transfer `left` any more, and expect the rest from `transfer`."""

    left: str
    transfer: str


class First(msgspec.Struct, frozen=True, tag="first"):
    """The token after the prompt. It binds whoever goes on, even if the KV never arrives."""

    token: Token


class Done(msgspec.Struct, frozen=True, tag="done"):
    """All of the prompt's KV is in place. Times are seconds before this was sent, since clocks of hosts differ."""

    computed_tokens: int
    started_ago_s: float
    ended_ago_s: float  # of the last chunk's computation
    moved_bytes: int = 0  # that were copied to the asker, in `moved_s` seconds over `transport`
    moved_s: float = 0.0
    transport: str = ""
    fetched_tokens: int = 0  # whose KV was copied from there


FromPrefill = Alive | Fetch | Fetched | Begin | More | Wrote | Switch | First | Done


class Granted(msgspec.Struct, frozen=True, tag="granted"):
    """The block table so far. Tokens before `start` are computed; from there on the blocks are the writer's.

    There are holes where windows will not read: at the end of the prompt, or, in place, after what it says it wrote.
    """

    lease: int
    start: int
    blocks: list[BlockId]


class NoRoom(msgspec.Struct, frozen=True, tag="no_room"):
    """The decode worker is short of blocks: drop the job."""


class Held(msgspec.Struct, frozen=True, tag="held"):
    """This block table holds the first tokens of the prompt, until you say Fetched or the call ends."""

    blocks: list[BlockId]


class Kept(msgspec.Struct, frozen=True, tag="kept"):
    """They were held until now."""


class Switched(msgspec.Struct, frozen=True, tag="switched"):
    """Go on."""


FromDecode = Granted | NoRoom | Held | Kept | Switched


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
