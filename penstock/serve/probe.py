"""How long it takes from one running worker to another, measured by the workers themselves while they serve.

`measure` is asked of the worker that sends: it calls `sink` of the other one over the connection that requests use, a
few times with next to nothing and then with bulk, a few pieces of it under way at a time so that others get through.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from penstock import clock
from penstock.cluster import Member
from penstock.errors import ConnectionLost
from penstock.serve.rpc import Call, Endpoint

PIECE_BYTES = 1 << 20
UNDER_WAY = 4  # pieces
MOST_BYTES = 1 << 30


class MeasureAsk(msgspec.Struct, frozen=True):
    """To whom, how often, and how much."""

    addresses: tuple[str, ...]
    round_trips: int = 20
    bulk_bytes: int = 64 << 20


class Measured(msgspec.Struct, frozen=True):
    """`latency_s` is half of the median round trip, `bytes_per_s` what the bulk came to."""

    medium: str  # "unix", "tcp": the first address that answered
    latency_s: float
    bytes_per_s: float
    bulk_bytes: int


_decode_ask = msgspec.msgpack.Decoder(MeasureAsk).decode
decode_measured = msgspec.msgpack.Decoder(Measured).decode
decode_members = msgspec.msgpack.Decoder(list[Member]).decode
_decode_piece = msgspec.msgpack.Decoder(bytes).decode
_decode_size = msgspec.msgpack.Decoder(int).decode


class Prober:
    """Serves `measure` and `sink`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def sink(self, call: Call) -> None:
        """Answers each piece with its size."""
        while (piece := await call.receive(_decode_piece)) is not None:
            call.send(len(piece))

    async def measure(self, call: Call) -> None:
        """Answers a MeasureAsk with one Measured. Raises ConnectionLost if the other one cannot be reached."""
        ask = _decode_ask(call.body)
        peer = await self._endpoint.peer(ask.addresses)
        async with peer.call("sink", None) as sink:
            trips = [await _send(sink, b"", 1) for _ in range(max(1, ask.round_trips) + 1)][1:]  # the first sets up
            pieces = max(1, min(ask.bulk_bytes, MOST_BYTES) // PIECE_BYTES)
            bulk_s = await _send(sink, bytes(PIECE_BYTES), pieces)
        round_trip_s = statistics.median(trips)
        sent = pieces * PIECE_BYTES
        rate = sent / max(bulk_s - round_trip_s, 1e-9)
        call.send(Measured(peer.name.partition(":")[0], round_trip_s / 2, rate, sent))


async def _send(sink: Call, piece: bytes, pieces: int) -> float:
    """Seconds until the last of so many pieces was answered."""
    begun_s = clock.now()
    for number in range(pieces):
        sink.send(piece)
        if number >= UNDER_WAY - 1:
            await _hear(sink)
    for _ in range(min(pieces, UNDER_WAY - 1)):
        await _hear(sink)
    return clock.now() - begun_s


async def _hear(sink: Call) -> None:
    if await sink.receive(_decode_size) is None:
        raise ConnectionLost(f"{sink.peer_name} stopped listening")


class Row(msgspec.Struct, frozen=True):
    """One direction between two workers; `failure` says why there is no measurement."""

    source: str
    target: str
    measured: Measured | None
    failure: str = ""


def pairs(members: Sequence[Member], partners: int) -> list[tuple[Member, Member]]:
    """Whom to measure: everybody with everybody, or each with at most so many of those that follow it in the list."""
    found = []
    for index, source in enumerate(members):
        others = [*members[index + 1 :], *members[:index]]
        found += [(source, target) for target in (others[:partners] if partners else others)]
    return found
