"""KV events over real ZMQ sockets."""

from __future__ import annotations

import pytest

from penstock.errors import SetupError
from penstock.kv_events import AllBlocksCleared, decode_batch
from penstock.wire.zmq_events import ZmqEvents
from tests.serve.fake_servers import publishers, repeating
from tests.support import run


def test_messages_come_in_order_and_again_when_asked_for() -> None:
    async def main() -> None:
        async with publishers(1) as (engine,), repeating(engine), ZmqEvents(engine.endpoint, engine.replay) as source:
            assert await source.replay(0) == []
            await engine.wait_subscriber()
            for _ in range(3):
                await engine.publish(AllBlocksCleared())
            came = [await source.read() for _ in range(3)]
            assert [number for number, _ in came] == [0, 1, 2]
            assert decode_batch(came[0][1]).events == (AllBlocksCleared(),)
            assert await source.replay(1) == came[1:]

    run(main())


def test_who_repeats_nothing_has_nothing_to_say() -> None:
    async def main() -> None:
        async with publishers(1) as (engine,), ZmqEvents(engine.endpoint) as source:
            assert await source.replay(0) == []

    run(main())


@pytest.mark.parametrize("endpoint", ["127.0.0.1:5557", "tcp://", "carrier-pigeon://roof"])
def test_a_wrong_endpoint_is_refused(endpoint: str) -> None:
    async def main() -> None:
        with pytest.raises(SetupError, match="no endpoint"):
            async with ZmqEvents(endpoint):
                pass

    run(main())
