"""One engine's KV events, in order, as changes to a prefix index: what is lost, repeated or restarted is noticed.

An engine names blocks by hashes of its own, and removals carry nothing else, so a feed remembers which of the index's
blocks each name stands for: a dictionary entry for every block that the engine holds is part of the index's cost.

    in order            its changes
    a gap               held back; `missing` says what to ask the engine's replay for, and `fill` takes the answer
    not in the replay   everything is cleared, and the feed goes on from what there is
    numbers go back     older news is a repeat and dropped; newer news is a restart, and everything is cleared
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from xxhash import xxh3_64_intdigest

from penstock.errors import WireError
from penstock.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, EngineHash, EventBatch, decode_known
from penstock.policy.prefix_index import TIERS, Incarnation, PrefixIndex, prefix_hashes
from penstock.tokens import TOKEN_BYTES, pack

FULL_ATTENTION = (None, "full_attention", "sink_full_attention", "mla_attention")
MEDIA = {None: 0, "GPU": 0, "CPU": 1, "DISK": 2, "STORAGE": 3}  # tiers of the index; any other counts as the last
Message: TypeAlias = tuple[int, bytes]  # sequence and payload


@dataclass(frozen=True, slots=True)
class Stored:
    """The engine holds these blocks of the index."""

    hashes: Sequence[int]
    tier: int


@dataclass(frozen=True, slots=True)
class Removed:
    """It does not hold them in this tier any more."""

    hashes: Sequence[int]
    tier: int


@dataclass(frozen=True, slots=True)
class Cleared:
    """It is not known to hold anything."""


Change: TypeAlias = Stored | Removed | Cleared


@dataclass(slots=True)
class FeedCounts:
    """Counters of one feed: messages up to `restarts`, then events that say nothing here."""

    taken: int = 0
    repeated: int = 0
    unreadable: int = 0
    gaps: int = 0  # that the engine was asked to fill
    gaps_lost: int = 0  # and could not
    restarts: int = 0
    unknown: int = 0  # of kinds that this release does not know
    orphaned: int = 0  # stored after a block that is not known
    other_groups: int = 0  # of layers that do not attend to everything, whose blocks say nothing about a prefix
    other_sizes: int = 0  # of blocks of another size than the first


def salt_of(adapter: str | None, cache_salt: str | None) -> str:
    """What keeps the prefixes of adapters (LoRA) and tenants apart; both sides of a look-up must make it here."""
    return f"{adapter or ''}\0{cache_salt or ''}" if adapter or cache_salt else ""


def apply(changes: Iterable[Change], index: PrefixIndex, worker: Incarnation) -> None:
    """Raises KeyError if the worker has no seat."""
    for change in changes:
        match change:
            case Stored(hashes, tier):
                index.stored(worker, hashes, tier)
            case Removed(hashes, tier):
                index.removed(worker, hashes, tier)
            case Cleared():
                index.cleared(worker)


class KvFeed:
    """Owned by whoever reads one engine's events. `block_tokens` is 0 until the first block is stored.

    `expected` is the number of the next message.
    """

    def __init__(self) -> None:
        self.block_tokens = 0
        self.counts = FeedCounts()
        self.expected = 0
        self._newest_s = float("-inf")  # the engine's clock, in the latest message
        self._held: dict[int, EventBatch] = {}  # what came after a gap
        self._group: int | None = None
        self._names: tuple[dict[EngineHash, int], ...] = tuple({} for _ in TIERS)

    @property
    def missing(self) -> int | None:
        """From which message on a replay is needed; None if there is no gap."""
        return self.expected if self._held else None

    def __len__(self) -> int:
        """Blocks that the engine is known to hold, in all tiers."""
        return sum(len(names) for names in self._names)

    def take(self, sequence: int, payload: bytes) -> list[Change]:
        """What a message changes; nothing yet, if one before it is missing."""
        batch = self._decode(payload)
        if sequence >= self.expected:
            return self._hold(sequence, batch)
        if batch.at_s <= self._newest_s:
            self.counts.repeated += 1
            return []
        self.counts.restarts += 1
        return [self._begin_at(0), *self._hold(sequence, batch)]

    def fill(self, replayed: Iterable[Message]) -> list[Change]:
        """The answer to a replay from `missing`, or from 0 at the start; what it lacks is given up."""
        changes = [change for sequence, payload in replayed for change in self.take(sequence, payload)]
        while held := self._held:
            self.counts.gaps_lost += 1
            changes += [self._begin_at(min(held)), *self._drain(held)]
        return changes

    def _decode(self, payload: bytes) -> EventBatch:
        """What cannot be read could have been anything: nothing is known after it."""
        try:
            batch, unknown = decode_known(payload)
        except WireError:
            self.counts.unreadable += 1
            return EventBatch(self._newest_s, (AllBlocksCleared(),))
        self.counts.unknown += unknown
        return batch

    def _hold(self, sequence: int, batch: EventBatch) -> list[Change]:
        self.counts.gaps += sequence > self.expected and not self._held
        self._held[sequence] = batch
        return self._drain(self._held)

    def _drain(self, held: dict[int, EventBatch]) -> list[Change]:
        """All that is next."""
        changes: list[Change] = []
        while (batch := held.pop(self.expected, None)) is not None:
            self.expected += 1
            self._newest_s = batch.at_s
            self.counts.taken += 1
            changes += [change for event in batch.events if (change := self._change(event)) is not None]
        self._held = held
        return changes

    def _begin_at(self, sequence: int) -> Cleared:
        """Forgets everything but what waits at or after `sequence`, which is the next."""
        self._held = {number: batch for number, batch in self._held.items() if number >= sequence}
        self.expected = sequence
        return self._clear()

    def _clear(self) -> Cleared:
        for names in self._names:
            names.clear()
        return Cleared()

    def _change(self, event: BlockStored | BlockRemoved | AllBlocksCleared) -> Change | None:
        match event:
            case BlockStored():
                return self._store(event)
            case BlockRemoved():
                return self._remove(event)
            case AllBlocksCleared():
                return self._clear()

    def _store(self, event: BlockStored) -> Stored | None:
        if not self._is_indexed(event):
            return None
        parent = None if event.parent_block_hash is None else self._find(event.parent_block_hash)
        if parent is None and event.parent_block_hash is not None:
            self.counts.orphaned += 1
            return None
        try:
            hashes = _hashes(event, parent)
        except OverflowError:  # ids that are no tokens
            self.counts.unknown += 1
            return None
        tier = _tier(event.medium)
        self._names[tier].update(zip(event.block_hashes, hashes, strict=False))
        return Stored(hashes, tier)

    def _is_indexed(self, event: BlockStored) -> bool:
        """Of the first group of layers that attend to everything, in blocks of the first size seen."""
        attends_to_all = event.kv_cache_spec_kind in FULL_ATTENTION and event.kv_cache_spec_sliding_window is None
        if not self.block_tokens and attends_to_all and event.block_size > 0:
            self.block_tokens, self._group = event.block_size, event.group_idx
        if not attends_to_all or event.group_idx != self._group:
            self.counts.other_groups += 1
            return False
        if event.block_size != self.block_tokens:
            self.counts.other_sizes += 1
            return False
        return True

    def _remove(self, event: BlockRemoved) -> Removed | None:
        if event.group_idx != self._group:
            self.counts.other_groups += 1
            return None
        tier = _tier(event.medium)
        names = self._names[tier]
        return Removed([names.pop(name) for name in event.block_hashes if name in names], tier)

    def _find(self, name: EngineHash) -> int | None:
        return next((found for names in self._names if (found := names.get(name)) is not None), None)


def _tier(medium: str | None) -> int:
    return MEDIA.get(medium, len(TIERS) - 1)


def _hashes(event: BlockStored, parent: int | None) -> list[int]:
    """The index's names of an event's blocks. Raises OverflowError for ids that are no tokens.

    A block with other keys than those of its adapter and its tenant, an image say, becomes one that no text can match.
    """
    packed, size = pack(event.token_ids), event.block_size
    adapter = event.lora_name or (f"#{event.lora_id}" if event.lora_id else "")
    extras = [_own_keys(keys, adapter) for keys in event.extra_keys or ()]
    salt = ""
    if parent is None:
        salt = salt_of(adapter, _take_cache_salt(extras))
    if not any(extras):
        return prefix_hashes(packed, size, salt, parent)
    hashes: list[int] = []
    last = xxh3_64_intdigest(salt.encode()) if parent is None else parent
    for number, start in enumerate(range(0, len(packed) - size * TOKEN_BYTES + 1, size * TOKEN_BYTES)):
        if keys := extras[number] if number < len(extras) else ():
            last = xxh3_64_intdigest(repr(keys).encode(), last)
        (last,) = prefix_hashes(packed[start : start + size * TOKEN_BYTES], size, parent=last)
        hashes.append(last)
    return hashes


def _own_keys(keys: object, adapter: str) -> tuple[object, ...]:
    return tuple(key for key in keys if key != adapter) if isinstance(keys, (list, tuple)) else ()


def _take_cache_salt(extras: list[tuple[object, ...]]) -> str:
    """The salt of a tenant, which an engine puts alone among the first block's keys; it is taken out of them."""
    if extras and len(extras[0]) == 1 and isinstance(salt := extras[0][0], str):
        extras[0] = ()
        return salt
    return ""
