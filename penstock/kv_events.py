"""KV events in the format that vLLM publishes over ZMQ: what an engine stored in its cache and removed from it.

A message is `[topic, sequence, payload]`; the sequence counts messages from 0, as 8 bytes, big-endian. The payload is
msgpack: `[timestamp, [event, ...], data_parallel_rank?]`. An event is a map with its name under "type", or, in older
releases, an array that begins with it. Consumers must expect an event more than once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import msgspec

from penstock.errors import WireError

EngineHash: TypeAlias = int | bytes  # an engine's own name for a block and all before it


class BlockStored(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Blocks that follow each other in one sequence, after `parent_block_hash`; `token_ids` are those of all of them.

    `medium` is the tier: "GPU" (what computes), "CPU", "DISK" ... `extra_keys` has for each block what else its hash
    depends on, such as the salt of a tenant.
    """

    block_hashes: tuple[EngineHash, ...]
    parent_block_hash: EngineHash | None
    token_ids: tuple[int, ...]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: tuple[object, ...] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class BlockRemoved(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Blocks that `medium` does not hold any more."""

    block_hashes: tuple[EngineHash, ...]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True):
    """The cache is empty."""


class _BlockStoredArray(BlockStored, frozen=True, tag="BlockStored", array_like=True):
    pass


class _BlockRemovedArray(BlockRemoved, frozen=True, tag="BlockRemoved", array_like=True):
    pass


class _AllBlocksClearedArray(AllBlocksCleared, frozen=True, tag="AllBlocksCleared", array_like=True):
    pass


KvEvent: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, frozen=True, array_like=True):
    """What one message carries. `at_s` is the engine's wall clock."""

    at_s: float
    events: tuple[KvEvent, ...]
    data_parallel_rank: int | None = None


class _RawBatch(msgspec.Struct, frozen=True, array_like=True):
    at_s: float
    events: tuple[msgspec.Raw, ...]
    data_parallel_rank: int | None = None


_decode_batch = msgspec.msgpack.Decoder(_RawBatch).decode
_decode_map: Callable[[msgspec.Raw], KvEvent] = msgspec.msgpack.Decoder(KvEvent).decode
_decode_array: Callable[[msgspec.Raw], KvEvent] = msgspec.msgpack.Decoder(
    _BlockStoredArray | _BlockRemovedArray | _AllBlocksClearedArray
).decode
encode_batch = msgspec.msgpack.Encoder().encode


def decode_batch(payload: bytes | memoryview) -> EventBatch:
    """Raises WireError for what is no batch of these events."""
    try:
        raw = _decode_batch(payload)
        return EventBatch(raw.at_s, tuple(map(_decode_event, raw.events)), raw.data_parallel_rank)
    except msgspec.MsgspecError as error:
        raise WireError(f"this is not a batch of KV events: {error}") from error


def decode_known(payload: bytes | memoryview) -> tuple[EventBatch, int]:
    """The same without the events that this release cannot read, and how many those are: engines add kinds of them."""
    try:
        raw = _decode_batch(payload)
    except msgspec.MsgspecError as error:
        raise WireError(f"this is not a batch of KV events: {error}") from error
    events: list[KvEvent] = []
    for each in raw.events:
        try:
            events.append(_decode_event(each))
        except msgspec.MsgspecError:
            continue
    return EventBatch(raw.at_s, tuple(events), raw.data_parallel_rank), len(raw.events) - len(events)


def _decode_event(raw: msgspec.Raw) -> KvEvent:
    first = memoryview(raw)[0]
    is_array = 0x90 <= first <= 0x9F or first in (0xDC, 0xDD)
    return _decode_array(raw) if is_array else _decode_map(raw)
