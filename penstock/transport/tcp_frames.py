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

import asyncio
import ipaddress
import socket
import struct
from collections.abc import Iterable, Sequence

import msgspec
from xxhash import xxh3_64

from penstock.errors import ConnectionLost, Refused, WireForm, from_wire
from penstock.transport.api import Offer

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

_LENGTH = struct.Struct("<I")
_MAX_HELLO_BYTES = 1 << 16

# A peer whose host is gone sends no end-of-file. It is probed after 10 s of silence, and dead after three probes or
# 25 s without an acknowledgement. The kernel sizes its buffers: to set them would end its tuning, which goes further.
# It takes little that it cannot send yet, since what it took has left the turns that pipes take.
_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 1 << 20),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000),
)


class Hello(msgspec.Struct, frozen=True):
    """This connection is of that link of `writer`, which will write into the region of this offer."""

    offer: Offer
    writer: str
    link: bytes
    has_checksums: bool


_encode = msgspec.msgpack.Encoder().encode
_decode_hello = msgspec.msgpack.Decoder(Hello).decode
_decode_answer = msgspec.msgpack.Decoder(WireForm | None).decode


# Reaching an owner


def split(address: str) -> tuple[str, int]:
    """Host and port of `tcp:HOST:PORT`. Raises Refused."""
    scheme, _, rest = address.partition(":")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdecimal() or int(port) > 65535:
        raise Refused(f"{address!r} is no address of a region: write tcp:HOST:PORT")
    return host.strip("[]"), int(port)


async def dial(address: str) -> socket.socket:
    """A connection to the first address of the host that answers. Raises Refused if nobody listens, or OSError."""
    host, port = split(address)
    loop = asyncio.get_running_loop()
    failure: OSError = OSError(f"{host} has no address")
    for family, _, _, _, where in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = new_socket(family)
        try:
            await loop.sock_connect(sock, where)
            return sock
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    if isinstance(failure, ConnectionRefusedError):
        raise Refused(f"nobody listens at {address} any more: ask its owner for the offer again") from failure
    raise failure


def new_socket(family: int) -> socket.socket:
    """Non-blocking. A connection inherits the options of its listener."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    for level, option, value in _OPTIONS:
        sock.setsockopt(level, option, value)
    return sock


def is_loopback(host: str) -> bool:
    """Whether bytes to this numeric address stay on this host."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


# The first message each way


async def say_hello(sock: socket.socket, hello: Hello) -> None:
    """The writer's side. Raises what the owner answers, or ConnectionLost."""
    await _send_message(sock, _encode(hello))
    refusal = _decode_answer(await _read_message(sock))
    if refusal is not None:
        raise from_wire(refusal)


async def read_hello(sock: socket.socket) -> Hello:
    """The owner's side, which answers with `answer_hello`. Raises Refused or ConnectionLost."""
    message = await _read_message(sock)
    try:
        return _decode_hello(message)
    except msgspec.DecodeError as error:
        raise Refused(f"its first message is not understood ({error}): run one version on both sides") from error


async def answer_hello(sock: socket.socket, refusal: WireForm | None) -> None:
    await _send_message(sock, _encode(refusal))


async def _send_message(sock: socket.socket, message: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, _LENGTH.pack(len(message)) + message)


async def _read_message(sock: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(await _read(sock, _LENGTH.size))
    if length > _MAX_HELLO_BYTES:
        raise Refused(f"its first message would have {length} bytes; the limit is {_MAX_HELLO_BYTES}")
    return await _read(sock, length)


async def _read(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = await asyncio.get_running_loop().sock_recv(sock, length - len(data))
        if not piece:
            raise ConnectionLost("the connection ended before its first message")
        data += piece
    return data


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
