"""What goes over the connections of the `tcp` transport, after the handshake of `auth`.

    writer                                            owner
        --- Hello (msgpack) ---------------------------->   on each connection of a link
        <-- None, or why not (msgpack) ------------------

        --- OPEN session name -------------------------->   a pipe
        <-- OPENED session ------------------------------
        --- DATA session number, ranges, bytes --------->   on any of the link's connections, straight into the region
        <-- PLACED, DAMAGED or DROPPED number -----------
        --- FETCH session number, ranges --------------->   likewise
        <-- PAYLOAD number, bytes -----------------------   straight into the writer's region
        <-- FETCHED checksum; or DROPPED number ---------   whether these are what was asked for
        --- CLOSE session ------------------------------>   what still comes of it is thrown away

        <-- GOODBYE reason ------------------------------   and the end of the link, at any time

All numbers are little-endian; a pipe's name is the xxh3 of the one it was given. A frame of DATA is its head, its
ranges in the owner's region, where the link has checksums the payload's and that of everything so far, and the payload.
One of FETCH has no payload, and no checksum of it. An owner that closes a session while it sends a payload sends other
bytes for the rest of it, then DROPPED; before it has begun it sends DROPPED alone.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Sequence

import msgspec
from xxhash import xxh3_64

from penstock.errors import Refused, WireForm, from_wire
from penstock.transport.api import Offer
from penstock.transport.sockets import read_message, send_message

PURPOSE = b"kv-tcp"

OPEN, DATA, FETCH, CLOSE = range(1, 5)  # kinds of heads
OPENED, PLACED, DAMAGED, DROPPED, PAYLOAD, FETCHED, GOODBYE = range(1, 8)  # kinds of replies

HEAD = struct.Struct("<B3xIQI")  # kind, session, number, ranges
# Kind, session, number: that of GOODBYE is the length of the reason that follows, of FETCHED the checksum, if any.
REPLY = struct.Struct("<B3xIQ")
RANGE = struct.Struct("<QQ")  # first byte in the region, bytes
DIGEST = struct.Struct("<Q")  # xxh3

MAX_RANGES = 512  # of a frame
MAX_FRAME_BYTES = 16 << 20  # of payload
MAX_REASON_BYTES = 1 << 12


class Hello(msgspec.Struct, frozen=True):
    """This connection is of that link of `writer`, which will write into the region of this offer."""

    offer: Offer
    writer: str
    link: bytes
    has_checksums: bool


_encode = msgspec.msgpack.Encoder().encode
_decode_hello = msgspec.msgpack.Decoder(Hello).decode
_decode_answer = msgspec.msgpack.Decoder(WireForm | None).decode


# The first message each way


async def say_hello(sock: socket.socket, hello: Hello) -> None:
    """The writer's side. Raises what the owner answers, or ConnectionLost."""
    await send_message(sock, _encode(hello))
    refusal = _decode_answer(await read_message(sock))
    if refusal is not None:
        raise from_wire(refusal)


async def read_hello(sock: socket.socket) -> Hello:
    """The owner's side, which answers with `answer_hello`. Raises Refused or ConnectionLost."""
    message = await read_message(sock)
    try:
        return _decode_hello(message)
    except msgspec.DecodeError as error:
        raise Refused(f"its first message is not understood ({error}): run one version on both sides") from error


async def answer_hello(sock: socket.socket, refusal: WireForm | None) -> None:
    await send_message(sock, _encode(refusal))


# Frames of data


def frame_head(
    session: int,
    number: int,
    ranges: Sequence[tuple[int, int]],
    payload: Iterable[memoryview] | None,
    has_checksums: bool,
) -> bytes:
    """All of a frame before its payload; of FETCH if there is none. `ranges` are first byte and bytes."""
    kind = FETCH if payload is None else DATA
    head = HEAD.pack(kind, session, number, len(ranges)) + b"".join(RANGE.pack(*each) for each in ranges)
    if not has_checksums:
        return head
    if payload is not None:
        head += DIGEST.pack(digest(payload))
    return head + DIGEST.pack(digest((head,)))


def digest(pieces: Iterable[bytes | bytearray | memoryview]) -> int:
    """Of all pieces, one after the other."""
    state = xxh3_64()
    for piece in pieces:
        state.update(piece)
    return state.intdigest()
