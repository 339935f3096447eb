"""Time and chance: the only module, beside `cli`, that reads the clock or unseeded randomness.

Code asks `now`, so the same code runs on a virtual clock: `sim.loop` puts its own time in the place of the real one.
Randomness is a `random.Random` handed down from `cli` (unseeded) or `sim` (seeded).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random, SystemRandom

_read: Callable[[], float] = time.monotonic


def now() -> float:
    """Seconds on the clock that the event loop's timers follow, on which all processes of one host agree.

    Not `loop.time()`: uvloop rounds that to milliseconds, and to the start of the loop's turn.
    """
    return _read()


@contextmanager
def virtual(read: Callable[[], float]) -> Iterator[None]:
    """Everything in this process reads `read` instead of the real clock while inside the block."""
    global _read
    real, _read = _read, read
    try:
        yield
    finally:
        _read = real


def wall_s() -> float:
    """Seconds since 1970, for what people and HTTP clients read. Never used in a decision."""
    return time.time()


def cpu_s() -> float:
    """Seconds of CPU that this process has used, for what people read."""
    return time.process_time()


def chance() -> Random:
    """Unseeded randomness for a real process."""
    return Random(SystemRandom().getrandbits(64))


def nonce(length_bytes: int = 32) -> bytes:
    """Bytes that nobody can guess and that never come again, for proofs and names. Never used in a decision."""
    return os.urandom(length_bytes)
