"""Blocks that wait to be moved, and how they are cut into runs: pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.blocks import BlockId


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes that lie next to each other on both sides."""

    here: int  # first byte
    there: int
    size: int


class Backlog:
    """Pairs of blocks (here, there), in the order in which they are to be moved: from there to here if `is_read`."""

    def __init__(self, block_bytes: int, is_read: bool = False) -> None:
        self.is_read = is_read
        self._block_bytes = block_bytes
        self._pairs: deque[tuple[BlockId, BlockId]] = deque()
        self._taken_bytes = 0  # of the first pair
        self.taken_pairs = 0  # whole ones

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def add(self, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        self._pairs.extend(pairs)

    def take(self, limit_bytes: int, max_runs: int) -> list[Run]:
        """The next of it: whole blocks, neighbours joined; of a block over the limit a part."""
        if self._pairs and (self._taken_bytes or self._block_bytes > limit_bytes):
            return [self._take_part(limit_bytes)]
        runs: list[Run] = []
        run_here = run_there = size = 0  # of the run that grows
        for _ in range(min(limit_bytes // self._block_bytes, len(self._pairs))):
            here, there = self._pairs[0]
            starts = here * self._block_bytes, there * self._block_bytes
            if size and starts == (run_here + size, run_there + size):
                size += self._block_bytes
            else:
                if size:
                    runs.append(Run(run_here, run_there, size))
                    if len(runs) == max_runs:
                        return runs
                (run_here, run_there), size = starts, self._block_bytes
            self._pairs.popleft()
            self.taken_pairs += 1
        return [*runs, Run(run_here, run_there, size)] if size else runs

    def _take_part(self, limit_bytes: int) -> Run:
        here, there = self._pairs[0]
        start = self._taken_bytes
        size = min(limit_bytes, self._block_bytes - start)
        self._taken_bytes += size
        if self._taken_bytes == self._block_bytes:
            self._pairs.popleft()
            self.taken_pairs += 1
            self._taken_bytes = 0
        return Run(here * self._block_bytes + start, there * self._block_bytes + start, size)
