"""TCP sockets and first messages, as the backends of this port that cross hosts use them."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import struct

from penstock.errors import AddressInUse, ConnectionLost, Refused, SetupError, UnsafeBind

LISTEN_BACKLOG = 1024
MAX_MESSAGE_BYTES = 1 << 16

_LENGTH = struct.Struct("<I")

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


async def send_message(sock: socket.socket, message: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, _LENGTH.pack(len(message)) + message)


async def read_message(sock: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(await _read(sock, _LENGTH.size))
    if length > MAX_MESSAGE_BYTES:
        raise Refused(f"its first message would have {length} bytes; the limit is {MAX_MESSAGE_BYTES}")
    return await _read(sock, length)


async def _read(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = await asyncio.get_running_loop().sock_recv(sock, length - len(data))
        if not piece:
            raise ConnectionLost("the connection ended before its first message")
        data += piece
    return data


async def listening(host: str, port: int) -> socket.socket:
    """Raises AddressInUse or SetupError."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise SetupError(f"cannot offer KV at {host}: no host of that name ({error.strerror})") from error
    family, _, _, _, where = found[0]
    listener = new_socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(LISTEN_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"{host}:{port} is in use: choose another port for KV, or 0 for a free one") from error
        raise SetupError(f"cannot offer KV at {host}:{port}: {error.strerror or error}") from error
    return listener


def check_host(host: str, token: str) -> None:
    """Raises UnsafeBind if strangers could write KV, SetupError for an address that means none in particular."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        is_local = host == "localhost"
    else:
        is_local = is_loopback(host)
        if address.is_unspecified:
            raise SetupError(f"peers cannot dial {host}: offer KV at the address by which they reach this host")
    if not is_local and not token:
        raise UnsafeBind(f"KV at {host} could be written by anybody: set PENSTOCK_TOKEN, or offer it at 127.0.0.1")
