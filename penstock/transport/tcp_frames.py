"""What goes over a TCP connection of the `tcp` transport, after the handshake of `auth`.

    writer                                            owner
        --- Hello (msgpack) ---------------------------->   on each connection of a link
        <-- None, or why not (msgpack) ------------------

        --- OPEN session ------------------------------->   a pipe
        <-- OPENED session ------------------------------
        --- DATA session number, ranges, bytes --------->   on any of the link's connections, straight into the region
        <-- PLACED or DAMAGED session number ------------
        --- CLOSE session ------------------------------>   what still comes of it is thrown away
        <-- CLOSED session ------------------------------

        <-- GOODBYE reason ------------------------------   and the end of the link, at any time

All numbers are little-endian. A frame of DATA is its head, its ranges in the owner's region, where the link has
checksums two of those (of the payload; of everything before itself), and the payload.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

import msgspec
from xxhash import xxh3_64, xxh3_64_intdigest

from penstock.errors import ConnectionLost, Refused, WireForm
from penstock.transport.api import Offer

PURPOSE = b"kv-tcp"

OPEN, DATA, CLOSE = range(1, 4)  # kinds of heads
OPENED, PLACED, DAMAGED, CLOSED, GOODBYE = range(1, 6)  # kinds of replies

HEAD = struct.Struct("<B3xIQI")  # kind, session, number, ranges
REPLY = struct.Struct("<B3xIQ")  # kind, session, number; of GOODBYE the number is the length of the reason that follows
RANGE = struct.Struct("<QQ")  # first byte in the region, bytes
DIGEST = struct.Struct("<Q")

MAX_RANGES = 512  # of a frame; with head and ranges below the kernel's 1,024 pieces for one call
MAX_FRAME_BYTES = 16 << 20  # of payload
MAX_REASON_BYTES = 1 << 12
PIECES = 128  # handed to the kernel at one time: more are only looked at and not moved

_LENGTH = struct.Struct("<I")
_MAX_HELLO_BYTES = 1 << 16

# A peer whose host is gone sends no end-of-file. It is probed after 10 s of silence, and dead after three probes or
# 25 s without an acknowledgement. Buffers are left to the kernel: setting their size ends its own tuning, which goes
# further. What is not sent yet stays here, where pipes take turns.
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
    """This connection belongs to that link of `writer`, over which it will write into the region of this offer."""

    offer: Offer
    writer: str
    link: bytes
    has_checksums: bool


_encode = msgspec.msgpack.Encoder().encode
_decode_hello = msgspec.msgpack.Decoder(Hello).decode
_decode_answer = msgspec.msgpack.Decoder(WireForm | None).decode


async def dial(address: str) -> socket.socket:
    """A connection to the first of the addresses `tcp:HOST:PORT` means that answers. Raises Refused or OSError."""
    host, port = split(address)
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise OSError(f"no host of the name {host} ({error.strerror})") from error
    failure: OSError | None = None
    for family, _, _, _, where in found:
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
        raise Refused(f"nobody listens at {address} any more: ask the owner for its offer again") from failure
    raise failure or OSError(f"{host} has no address")


def new_socket(family: int) -> socket.socket:
    """Non-blocking. A connection inherits the options of its listener."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    for level, option, value in _OPTIONS:
        sock.setsockopt(level, option, value)
    return sock


def split(address: str) -> tuple[str, int]:
    """Host and port of `tcp:HOST:PORT`. Raises Refused."""
    scheme, _, rest = address.partition(":")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdecimal() or int(port) > 65535:
        raise Refused(f"{address!r} is no address of a region: it should be tcp:HOST:PORT")
    return host.strip("[]"), int(port)


def is_loopback(sock: socket.socket) -> bool:
    """Whether its peer is on this host, reached without a network."""
    return ipaddress.ip_address(sock.getpeername()[0].partition("%")[0]).is_loopback


async def say_hello(sock: socket.socket, hello: Hello) -> None:
    """Raises what the owner answers, or ConnectionLost."""
    await _send_message(sock, _encode(hello))
    refusal = _decode_answer(await _read_message(sock))
    if refusal is not None:
        from penstock.errors import from_wire

        raise from_wire(refusal)
