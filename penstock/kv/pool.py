"""Who holds which block of a region.

free --take--> held --drop (last reference)--> idle --free--> free
                |                               idle: kept for its content, see `prefix_cache`
                +--quarantine--> quarantined --readmit--> free
                     somebody may still be writing it, see `lease`
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.blocks import BlockId
from penstock.errors import OutOfBlocks


class BlockPool:
    """References to blocks `0 .. blocks-1`. Used by `PrefixCache`, its only owner."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free = [BlockId(b) for b in range(blocks - 1, -1, -1)]
        self._references = [0] * blocks
        self._quarantined: dict[BlockId, None] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def quarantined(self) -> int:
        return len(self._quarantined)

    def take(self, count: int) -> list[BlockId]:
        """`count` free blocks with one reference each. Raises OutOfBlocks and takes none if there are fewer."""
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks wanted, {len(self._free)} of {self.blocks} are free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def hold(self, block: BlockId) -> int:
        """One more reference; returns how many there are."""
        self._references[block] += 1
        return self._references[block]

    def drop(self, block: BlockId) -> bool:
        """One reference less; True if it was the last, and the block is idle now."""
        if self._references[block] <= 0:
            raise AssertionError(f"block {block} is dropped more often than held")
        self._references[block] -= 1
        return self._references[block] == 0

    def free_idle(self, block: BlockId) -> None:
        """Gives an idle block back."""
        self._free.append(block)

    def quarantine(self, blocks: Sequence[BlockId]) -> None:
        """Blocks with one reference become nobody's, and are not handed out until readmitted."""
        for block in blocks:
            if self._references[block] != 1:
                raise AssertionError(f"block {block} is shared and cannot have been writable")
            self._references[block] = 0
            self._quarantined[block] = None

    def readmit(self, blocks: Sequence[BlockId]) -> None:
        """Nobody can write these any more."""
        for block in blocks:
            del self._quarantined[block]
            self._free.append(block)

    def check_integrity(self, idle: int) -> None:
        """Every block is in exactly one state, `idle` of them idle."""
        held = sum(1 for count in self._references if count > 0)
        total = len(self._free) + held + len(self._quarantined) + idle
        if total != self.blocks or len(dict.fromkeys(self._free)) != len(self._free):
            raise AssertionError(
                f"{self.blocks} blocks, but {len(self._free)} free, {held} held, {len(self._quarantined)} in "
                f"quarantine and {idle} idle"
            )
