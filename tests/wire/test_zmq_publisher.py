"""What other routers read of a worker over ZMQ, with plain pyzmq and msgpack as they do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import uvloop
import zmq
import zmq.asyncio

from penstock.blocks import BlockId
from penstock.errors import AddressInUse, SetupError, UnsafeBind
from penstock.kv.journal import Journal, Origin
from penstock.kv_events import BlockRemoved, BlockStored, decode_batch
from penstock.tokens import pack
from penstock.wire.zmq_publisher import PublisherOptions, publishing
from tests.support import run

SIZE = 2


def store(journal: Journal, block: int, parent: int | None, salt: str = "") -> None:
    """Route hash and first token are its number plus ten."""
    journal.stored(BlockId(block), block + 10, Origin(parent, pack([block + 10, 0]), salt))


def options_in(folder: Path, **more: object) -> PublisherOptions:
    return PublisherOptions(f"ipc://{folder}/events", f"ipc://{folder}/replay", flush_s=0.001, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_another_router_hears_what_is_stored_and_evicted(
    tmp_path: Path, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def story() -> None:
        options, journal = options_in(tmp_path, topic="kv"), Journal(100, keeps_origins=True)
        with zmq.asyncio.Context() as context:
            async with publishing(journal, SIZE, options):
                with context.socket(zmq.SUB) as events:
                    events.connect(options.endpoint)
                    events.subscribe(options.topic)
                    await wait_heard(journal, events)
                    for block, parent in ((0, None), (1, 10), (5, 11), (7, 99)):
                        store(journal, block, parent)
                    topic, sequence, payload = await events.recv_multipart()
                    assert (topic, int.from_bytes(sequence, "big")) == (b"kv", await count_sent(context, options) - 1)
                    _, (one, other), *_ = msgspec.msgpack.decode(payload)
                    assert one == {
                        "type": "BlockStored",
                        "block_hashes": [10, 11, 15],
                        "parent_block_hash": None,
                        "token_ids": [10, 0, 11, 0, 15, 0],
                        "block_size": SIZE,
                        "medium": "GPU",
                    }
                    assert (other["block_hashes"], other["parent_block_hash"]) == ([17], 99)
                    journal.evicted(BlockId(1))
                    store(journal, 20, None, salt="tenant")
                    *_, payload = await events.recv_multipart()
                    assert decode_batch(payload).events == (
                        BlockStored((30,), None, (30, 0), SIZE, medium="GPU", extra_keys=(["tenant"],)),
                        BlockRemoved((11,), "GPU"),
                    )

    run(story(), loop_factory=loop_factory)


async def wait_heard(journal: Journal, events: zmq.asyncio.Socket) -> None:
    """Returns when the subscription works: what was published before it came is lost."""
    block = 90
    while not await events.poll(20):
        journal.evicted(BlockId(block))
        store(journal, block, None)
    while await events.poll(20):
        await events.recv_multipart()


async def replayed(context: zmq.asyncio.Context, options: PublisherOptions, since: int) -> list[tuple[int, bytes]]:
    found = []
    with context.socket(zmq.DEALER) as socket:
        socket.connect(options.replay)
        await socket.send_multipart([b"", since.to_bytes(8, "big")])
        while True:
            empty, sequence, payload = await socket.recv_multipart()
            assert empty == b""
            found.append((int.from_bytes(sequence, "big", signed=True), payload))
            if found[-1][0] == -1:
                return found


async def count_sent(context: zmq.asyncio.Context, options: PublisherOptions) -> int:
    return (await replayed(context, options, 0))[-2][0] + 1


def test_what_was_missed_is_repeated_as_far_as_it_is_remembered(tmp_path: Path) -> None:
    async def story() -> None:
        options, journal = options_in(tmp_path, repeats=3), Journal(100, keeps_origins=True)
        with zmq.asyncio.Context() as context:
            async with publishing(journal, SIZE, options):
                for block in range(5):
                    store(journal, block, None)
                    while len(told := await replayed(context, options, block)) == 1:
                        assert told == [(-1, b"")]
                    assert told[0][0] == block
                messages = await replayed(context, options, 0)
                assert [sequence for sequence, _ in messages] == [2, 3, 4, -1]
                (event,) = decode_batch(messages[1][1]).events
                assert isinstance(event, BlockStored) and event.block_hashes == (13,)

    run(story())


def test_what_was_lost_is_told_as_such(tmp_path: Path) -> None:
    async def story() -> None:
        options, journal = options_in(tmp_path), Journal(100, keeps_origins=True, most_pending=3)
        with zmq.asyncio.Context() as context:
            async with publishing(journal, SIZE, options):
                for block in range(50):
                    store(journal, block, None)
                while len(told := await replayed(context, options, 0)) == 1:
                    pass
                assert msgspec.msgpack.decode(told[0][1])[1] == [{"type": "AllBlocksCleared"}]

    run(story())


@pytest.mark.parametrize(
    ("endpoint", "error", "says"),
    [
        ("tcp://0.0.0.0:5557", UnsafeBind, "tell strangers"),
        ("tcp://*:5557", UnsafeBind, "tell strangers"),
        ("5557", SetupError, "no endpoint for KV events"),
        ("ipc:///nowhere/to/be/found", SetupError, "cannot publish KV events"),
    ],
)
def test_where_it_must_not_or_cannot_publish_it_says_so(endpoint: str, error: type[Exception], says: str) -> None:
    async def story() -> None:
        with pytest.raises(error, match=says):
            async with publishing(Journal(1), SIZE, PublisherOptions(endpoint)):
                pass

    run(story())


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    async def story() -> None:
        with zmq.asyncio.Context() as context, context.socket(zmq.PUB) as other:
            port = other.bind_to_random_port("tcp://127.0.0.1")
            with pytest.raises(AddressInUse, match="is taken"):
                async with publishing(Journal(1), SIZE, PublisherOptions(f"tcp://127.0.0.1:{port}")):
                    pass

    run(story())
