"""KV events over ZMQ for other routers, in the format of `penstock.kv_events`: what a worker's cache stores and evicts.

Whoever subscribes hears what happens from then on. A second socket repeats what was published lately, from a sequence
number on: a request is its 8 bytes, big-endian; the answers are (sequence, payload), the last of them (-1, nothing).
ZMQ's own way of keeping strangers out (CURVE) is spoken by none of the routers that read this, so only this host may.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import zmq
import zmq.asyncio

from penstock import clock
from penstock.errors import AddressInUse, SetupError, UnsafeBind
from penstock.kv.journal import Changes, Journal, Origin, Tail
from penstock.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch, KvEvent, encode_batch
from penstock.tokens import unpack

MEDIUM = "GPU"  # the field's word for what computes, whatever it is
END = (-1).to_bytes(8, "big", signed=True)
BACKLOG = 1000  # messages that wait for one slow subscriber; it loses those that come then
MOST_BLOCKS = 1024  # of one event

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class PublisherOptions:
    """Where it publishes, and where it repeats the last `repeats` messages, if anywhere; `tcp:` or `ipc:` endpoints."""

    endpoint: str
    replay: str = ""
    topic: str = ""
    repeats: int = 10_000
    flush_s: float = 0.02


@asynccontextmanager
async def publishing(journal: Journal, block_tokens: int, options: PublisherOptions) -> AsyncIterator[None]:
    """Publishes while inside the block. `journal` keeps origins.

    Raises UnsafeBind for an endpoint that other hosts reach, AddressInUse or SetupError for one that cannot be bound.
    """
    with ExitStack() as stack:
        context = stack.enter_context(zmq.asyncio.Context())
        context.linger = 0
        events = stack.enter_context(_bound(context, zmq.PUB, options.endpoint, BACKLOG))
        publisher = _Publisher(events, block_tokens, options)
        lives = [publisher.publish(stack.enter_context(journal.follow()))]
        if options.replay:
            replay = stack.enter_context(_bound(context, zmq.ROUTER, options.replay, options.repeats + 1))
            lives.append(publisher.repeat(replay))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(life) for life in lives]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()


class _Publisher:
    """Numbers messages from 0 and remembers the last of them."""

    def __init__(self, socket: zmq.asyncio.Socket, block_tokens: int, options: PublisherOptions) -> None:
        self._socket = socket
        self._block_tokens = block_tokens
        self._options = options
        self._sequence = 0
        self._sent: deque[tuple[bytes, bytes]] = deque(maxlen=options.repeats)

    async def publish(self, tail: Tail) -> None:
        changed = asyncio.Event()
        tail.on_change = changed.set
        changed.set()  # there may be something already
        while True:
            await changed.wait()
            await asyncio.sleep(self._options.flush_s)
            changed.clear()
            if tail.is_cut:  # nobody can be told what was lost, so all that is known of this worker is
                tail.begin()
                await self._send([AllBlocksCleared()])
            elif events := list(_events(tail.take(), self._block_tokens)):
                await self._send(events)

    async def repeat(self, socket: zmq.asyncio.Socket) -> None:
        """Answers those who ask for what they missed."""
        while True:
            asker, *asked = await socket.recv_multipart()
            since = int.from_bytes(asked[-1], "big") if asked else self._sequence
            for sequence, payload in [sent for sent in self._sent if int.from_bytes(sent[0], "big") >= since]:
                await socket.send_multipart([asker, b"", sequence, payload])
            await socket.send_multipart([asker, b"", END, b""])

    async def _send(self, events: list[KvEvent]) -> None:
        sequence = self._sequence.to_bytes(8, "big")
        payload = encode_batch(EventBatch(clock.wall_s(), tuple(events)))
        self._sequence += 1
        self._sent.append((sequence, payload))
        await self._socket.send_multipart([self._options.topic.encode(), sequence, payload])


def _events(changes: Changes, block_tokens: int) -> Iterator[KvEvent]:
    """Blocks that follow each other, in a sequence of tokens or of evictions, share an event."""
    stored: list[tuple[int, Origin]] = []
    removed: list[int] = []
    for route, origin in changes.items():
        if origin is None:
            removed.append(route)
            continue
        if stored and (origin.parent != stored[-1][0] or len(stored) == MOST_BLOCKS):
            yield _stored(stored, block_tokens)
            stored = []
        stored.append((route, origin))
    if stored:
        yield _stored(stored, block_tokens)
    if removed:
        yield BlockRemoved(tuple(removed), MEDIUM)


def _stored(blocks: list[tuple[int, Origin]], block_tokens: int) -> BlockStored:
    first = blocks[0][1]
    extra_keys = None
    if first.salt and first.parent is None:  # what follows depends on it through its parent
        extra_keys = ((first.salt,), *[None] * (len(blocks) - 1))
    return BlockStored(
        block_hashes=tuple(route for route, _ in blocks),
        parent_block_hash=first.parent,
        token_ids=tuple(unpack(b"".join(origin.tokens for _, origin in blocks))),
        block_size=block_tokens,
        medium=MEDIUM,
        extra_keys=extra_keys,
    )


def _bound(context: zmq.asyncio.Context, kind: int, endpoint: str, backlog: int) -> zmq.asyncio.Socket:
    address = urlsplit(endpoint)
    if address.scheme not in ("tcp", "ipc"):
        raise SetupError(f"{endpoint!r} is no endpoint for KV events; give one as tcp://127.0.0.1:5557")
    if address.scheme == "tcp" and address.hostname not in LOOPBACK:
        raise UnsafeBind(
            f"KV events at {endpoint} would tell strangers what people ask: publish at tcp://127.0.0.1:PORT and carry "
            "them elsewhere through a tunnel that is authenticated"
        )
    socket = context.socket(kind)
    socket.set(zmq.SNDHWM, backlog)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        if error.errno == zmq.EADDRINUSE:
            raise AddressInUse(f"{endpoint} is taken; choose another port for --kv-events") from error
        raise SetupError(f"cannot publish KV events at {endpoint}: {error}") from error
    return socket
