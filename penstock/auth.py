"""Proof that both ends of a new connection know one token, without sending it.

    connector                                listener
        --- greeting: magic, version, nonce --->
        <-- greeting: magic, version, nonce ----
        --- proof ----------------------------->   checks it
        <-- verdict, proof ---------------------   the connector checks that one

A proof is HMAC-SHA256, keyed by the token, over its sender's side, the purpose of the connection and both
greetings: it cannot be replayed, reflected or used on another plane. All messages have a fixed size and a deadline,
so a stranger can make nobody wait long or remember much. What follows is neither encrypted nor signed.

Used by wire.stream and transport.shm, on stream or packet sockets.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

from penstock import clock
from penstock.errors import ConnectionLost, Refused

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
MAX_STRANGERS = 64  # peers that may be in their handshake at one time; more wait in the kernel's queue
ACCEPT_RETRY_S = 0.1

_MAGIC = b"penstock"
_VERSION = 1
_GREETING = struct.Struct("<8sH32s")  # magic, version, nonce
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_VERDICT = struct.Struct("<B32s")  # one of the following, proof
_WELCOME, _WRONG_TOKEN = range(2)
_PROOF_BYTES = 32
_TOKEN_HINT = "set PENSTOCK_TOKEN to the same value on both sides"

Admitted = Callable[[socket.socket], Awaitable[None]]


async def join(sock: socket.socket, token: str, purpose: bytes, where: str) -> None:
    """The connector's side, on a connected non-blocking socket; `where` is the listener, for messages.

    Raises Refused (wrong token, other version, no penstock at all), ConnectionLost or OSError. The caller sets
    the deadline.
    """
    send = asyncio.get_running_loop().sock_sendall
    ours = _GREETING.pack(_MAGIC, _VERSION, clock.nonce())
    await send(sock, ours)
    theirs = await _read(sock, _GREETING.size)
    _check_greeting(theirs, where)
    await send(sock, _proof(token, purpose, b"connector", ours, theirs))
    verdict, proof = _VERDICT.unpack(await _read(sock, _VERDICT.size))
    if verdict == _WRONG_TOKEN:
        raise Refused(f"{where} has another token than this process: {_TOKEN_HINT}")
    if not hmac.compare_digest(proof, _proof(token, purpose, b"listener", ours, theirs)):
        raise Refused(f"{where} could not prove that it knows the token of this process: {_TOKEN_HINT}")


async def challenge(sock: socket.socket, token: str, purpose: bytes) -> None:
    """The listener's side, as `join`. A peer with another token is told so."""
    send = asyncio.get_running_loop().sock_sendall
    ours = _GREETING.pack(_MAGIC, _VERSION, clock.nonce())
    await send(sock, ours)
    theirs = await _read(sock, _GREETING.size)
    _check_greeting(theirs, "it")
    proof = await _read(sock, _PROOF_BYTES)
    if not hmac.compare_digest(proof, _proof(token, purpose, b"connector", theirs, ours)):
        await send(sock, _VERDICT.pack(_WRONG_TOKEN, bytes(_PROOF_BYTES)))
        raise Refused(f"it has another token than this process: {_TOKEN_HINT}")
    await send(sock, _VERDICT.pack(_WELCOME, _proof(token, purpose, b"listener", theirs, ours)))


@asynccontextmanager
async def admitting(listener: socket.socket, token: str, purpose: bytes, admitted: Admitted) -> AsyncIterator[None]:
    """Accepts peers while inside the block; `admitted` is awaited with the socket of each that knows `token`.

    `listener` is non-blocking. Each peer has a task of its own, which ends with the block. Its socket is closed when
    `admitted` returns, unless that has detached it. A failure of one peer, or of `admitted` for it, is reported and
    reaches no other.
    """
    # Not a TaskGroup around the block: it would wrap whatever the block raises in an ExceptionGroup.
    accepting = asyncio.create_task(_accept(listener, token, purpose, admitted))
    try:
        yield
    finally:
        accepting.cancel()
        await asyncio.wait((accepting,))


def process_of(sock: socket.socket) -> tuple[int, int]:
    """Process id and user id of who made a Unix connection, as the kernel noted them then."""
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


def peer_name(sock: socket.socket) -> str:
    """Who is at the other end, for messages to people. Raises OSError if nobody is any more."""
    if sock.family == socket.AF_UNIX:
        return f"unix:process {process_of(sock)[0]}"
    host, port, *_ = sock.getpeername()
    return f"tcp:{host}:{port}"


async def wait_readable(sock: socket.socket) -> None:
    """Returns when there is something to read or to accept, or the end."""
    readable = asyncio.Event()
    asyncio.get_running_loop().add_reader(sock, readable.set)
    try:
        await readable.wait()
    finally:
        asyncio.get_running_loop().remove_reader(sock)


async def _accept(listener: socket.socket, token: str, purpose: bytes, admitted: Admitted) -> None:
    strangers = asyncio.Semaphore(MAX_STRANGERS)
    async with asyncio.TaskGroup() as peers:
        while True:
            await strangers.acquire()
            sock = await _next_peer(listener)
            task = peers.create_task(_admit(sock, strangers, token, purpose, admitted))
            task.add_done_callback(partial(_close, sock))


def _close(sock: socket.socket, _: asyncio.Task[None]) -> None:
    sock.close()


async def _next_peer(listener: socket.socket) -> socket.socket:
    # Not loop.sock_accept, which loses a socket when it is cancelled at the wrong moment.
    while True:
        try:
            sock, _ = listener.accept()
            sock.setblocking(False)
            return sock
        except BlockingIOError:
            await wait_readable(listener)
        except OSError as error:  # the peer left already, or file descriptors ran out: both pass
            log.warning("cannot accept a connection, trying again: %s", error)
            await asyncio.sleep(ACCEPT_RETRY_S)


async def _admit(
    sock: socket.socket, strangers: asyncio.Semaphore, token: str, purpose: bytes, admitted: Admitted
) -> None:
    peer = "a peer"
    try:
        try:
            peer = peer_name(sock)
            async with asyncio.timeout(HANDSHAKE_S):
                await challenge(sock, token, purpose)
        finally:
            strangers.release()
        await admitted(sock)
    except (Refused, ConnectionLost, OSError) as error:  # a TimeoutError, too, is an OSError
        log.warning("turned away %s: %s", peer, str(error) or "it was too slow")
    except Exception as error:
        message = f"serving the {purpose.decode()} connection of {peer} failed"
        asyncio.get_running_loop().call_exception_handler({"message": message, "exception": error})


def _check_greeting(greeting: bytes, where: str) -> None:
    magic, version, _ = _GREETING.unpack(greeting)
    if magic != _MAGIC:
        raise Refused(f"{where} is not penstock")
    if version != _VERSION:
        raise Refused(f"{where} speaks protocol version {version} and this process {_VERSION}: run one version of both")


def _proof(token: str, purpose: bytes, side: bytes, connectors: bytes, listeners: bytes) -> bytes:
    # The greetings have a fixed size and come last, so no two different inputs read the same.
    return hmac.digest(token.encode(), b"%s %s " % (side, purpose) + connectors + listeners, "sha256")


async def _read(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = await asyncio.get_running_loop().sock_recv(sock, length - len(data))
        if not piece:
            raise ConnectionLost("the connection ended in its handshake")
        data += piece
    return data
