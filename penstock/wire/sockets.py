"""The sockets under wire.stream: reaching an address, and listening at one.

An address is `tcp:HOST:PORT`, `unix:PATH` or `unix:@NAME`, the last in Linux's abstract namespace. To listen it may
also be `fd:N`, a TCP socket that this process was given, bound and listening.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from penstock.errors import AddressInUse, Refused, SetupError

LISTEN_BACKLOG = 1024

# A peer whose host is gone sends no end-of-file. It is probed after 10 s of silence, and dead after three probes or
# 25 s without an acknowledgement.
_TCP_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000),
)

SocketAddress = str | tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]


async def dial(address: str) -> socket.socket:
    """A connected socket, to the first of a name's addresses that answers. Raises Refused."""
    failures = []
    for family, where in await _resolve(address):
        sock = _socket(family)
        try:
            await asyncio.get_running_loop().sock_connect(sock, where)
            return sock
        except OSError as error:
            sock.close()
            failures.append(error.strerror or str(error))
        except BaseException:
            sock.close()
            raise
    raise Refused(f"nobody listens at {address} ({'; '.join(failures)}): is the address right, does it run?")


@asynccontextmanager
async def listening(address: str) -> AsyncIterator[tuple[socket.socket, str]]:
    """A listening socket and the address bound; closed, and its file removed, at the end.

    Raises AddressInUse, or SetupError for an address that cannot be bound.
    """
    if address.startswith("fd:"):
        with socket.socket(fileno=os.dup(int(address.removeprefix("fd:")))) as given:
            given.setblocking(False)
            for level, option, value in _TCP_OPTIONS:
                given.setsockopt(level, option, value)
            yield given, f"tcp:{given.getsockname()[0]}:{given.getsockname()[1]}"
        return
    try:
        family, where = (await _resolve(address))[0]
    except Refused as error:
        raise SetupError(f"cannot listen: {error}") from error
    with _socket(family) as listener:
        try:
            file = _bind(listener, where)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(f"{address} is in use: choose another, or stop who listens there") from error
            raise SetupError(f"cannot listen at {address}: {error.strerror or error}") from error
        try:
            yield listener, _bound_address(address, listener)
        finally:
            if file is not None:
                _remove(*file)


async def _resolve(address: str) -> list[tuple[int, SocketAddress]]:
    """Family and socket address of each address that a name has. Raises Refused."""
    scheme, _, rest = address.partition(":")
    if scheme == "unix" and rest:
        return [(socket.AF_UNIX, "\0" + rest[1:] if rest.startswith("@") else rest)]
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdecimal() or int(port) > 65535:
        raise Refused(f"{address!r} is no address: write tcp:HOST:PORT, unix:PATH or unix:@NAME")
    resolve = asyncio.get_running_loop().getaddrinfo
    try:
        found = await resolve(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise Refused(f"{address}: no host of that name ({error.strerror})") from error
    return [(int(family), where) for family, _, _, _, where in found]


def _socket(family: int) -> socket.socket:
    """Non-blocking. A connection inherits the options of its listener."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    if family != socket.AF_UNIX:
        for level, option, value in _TCP_OPTIONS:
            sock.setsockopt(level, option, value)
    return sock


def _bind(listener: socket.socket, where: SocketAddress) -> tuple[Path, int] | None:
    """Binds and listens. Returns the file that this made, if it made one, and its inode."""
    if not isinstance(where, str) or where.startswith("\0"):
        # Connections that ended a minute ago do not keep a new process from the port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(LISTEN_BACKLOG)
        return None
    path = Path(where)
    with _locked(path.parent):
        if _is_abandoned(path):
            path.unlink()
        listener.bind(where)
        listener.listen(LISTEN_BACKLOG)
        return path, path.stat().st_ino


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Held for an instant, so that two who find one abandoned socket do not remove each other's new one."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_abandoned(path: Path) -> bool:
    """A socket whose process is gone."""
    if not path.is_socket():
        return False
    with _socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED


def _remove(path: Path, inode: int) -> None:
    try:
        if path.stat().st_ino == inode:
            path.unlink()
    except FileNotFoundError:
        pass  # somebody tidied up before us


def _bound_address(address: str, listener: socket.socket) -> str:
    if listener.family == socket.AF_UNIX:
        return address
    return f"{address.rpartition(':')[0]}:{listener.getsockname()[1]}"
