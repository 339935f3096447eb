"""The handshake by itself; tests/wire/test_stream.py has the strangers."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager

import pytest

from penstock import auth
from penstock.errors import Refused
from tests.support import run

KINDS = pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])


@contextmanager
def pair(kind: int = socket.SOCK_STREAM) -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair(socket.AF_UNIX, kind)
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        yield near, far


async def shake(kind: int, ours: tuple[str, bytes], theirs: tuple[str, bytes]) -> list[object]:
    """What became of the connector and of the listener, each with a token and a purpose."""
    with pair(kind) as (near, far):
        sides: list[Awaitable[None]] = [auth.join(near, *ours, "the peer"), auth.challenge(far, *theirs)]
        return list(await asyncio.gather(*sides, return_exceptions=True))


@KINDS
def test_equal_tokens_and_purposes_agree(kind: int) -> None:
    assert run(shake(kind, ("token", b"wire"), ("token", b"wire"))) == [None, None]


@KINDS
@pytest.mark.parametrize("theirs", [("other", b"wire"), ("", b"wire"), ("token", b"kv")])
def test_other_tokens_and_purposes_are_refused_on_both_sides(kind: int, theirs: tuple[str, bytes]) -> None:
    outcomes = run(shake(kind, ("token", b"wire"), theirs))
    assert [type(outcome) for outcome in outcomes] == [Refused, Refused]


def test_a_proof_cannot_be_replayed() -> None:
    async def story() -> None:
        read, send = asyncio.get_running_loop().sock_recv, asyncio.get_running_loop().sock_sendall
        with pair() as (connector, thief), pair() as (thiefs, listener), pair() as (thiefs_again, listener_again):
            joining = asyncio.create_task(auth.join(connector, "token", b"wire", "the peer"))
            first = asyncio.create_task(auth.challenge(listener, "token", b"wire"))
            greeting = await read(thief, 1000)
            await send(thiefs, greeting)
            await send(thief, await read(thiefs, 1000))
            proof = await read(thief, 1000)
            await send(thiefs, proof)
            await send(thief, await read(thiefs, 1000))
            await joining
            await first
            await send(thiefs_again, greeting + proof)  # what was right a moment ago
            with pytest.raises(Refused, match="token"):
                await auth.challenge(listener_again, "token", b"wire")

    run(story())


def test_a_connector_is_not_fooled_by_its_own_words() -> None:
    async def story() -> None:
        read, send = asyncio.get_running_loop().sock_recv, asyncio.get_running_loop().sock_sendall
        with pair() as (connector, mirror):
            joining = asyncio.create_task(auth.join(connector, "token", b"wire", "the peer"))
            await send(mirror, await read(mirror, 1000))
            await send(mirror, b"\x00" + await read(mirror, 1000))
            with pytest.raises(Refused, match="could not prove"):
                await joining

    run(story())


def test_the_process_behind_a_unix_connection_is_known() -> None:
    with pair() as (near, _):
        assert auth.process_of(near) == (os.getpid(), os.geteuid())
        assert auth.peer_name(near) == f"unix:process {os.getpid()}"
