"""How late the event loop runs: what a busy engine thread does to everything else in its process."""

from __future__ import annotations

import asyncio
from collections import deque

from penstock import clock


class Pulse:
    """Sleeps `period_s` again and again, and remembers by how much each sleep overran."""

    def __init__(self, period_s: float, window: int = 400) -> None:
        self._period_s = period_s
        self._delays_s: deque[float] = deque(maxlen=window)

    @property
    def delay_p99_s(self) -> float:
        """99th percentile of the last delays; 0 before the first."""
        ordered = sorted(self._delays_s)
        return ordered[int(0.99 * (len(ordered) - 1))] if ordered else 0.0

    async def run(self) -> None:
        while True:
            due_s = clock.now() + self._period_s
            await asyncio.sleep(self._period_s)
            self._delays_s.append(max(0.0, clock.now() - due_s))
