"""The door in front of the router: lets requests through while workers can keep to the service level.

arrival -- the workers' queues are short, and nobody waits --------------------> routed
   |                                                                               ^
   |-- waits in the fair queue -- its turn, and queues are short again ------------|
   |       |-- it became too late; others had more right to its place; the client left
   '-- refused at once: it would wait too long

Nobody waits beyond the moment at which the objective, or the client's own deadline, is missed for certain.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from penstock import clock
from penstock.errors import DeadlineExceeded, Overloaded, OverShare, PenstockError
from penstock.metrics import QueueMetrics, count
from penstock.policy.admission import ServiceLevel, expected_s
from penstock.policy.fair_queue import FairQueue, Waiting
from penstock.policy.forecast import Forecast
from penstock.request import Request


@dataclass(slots=True, eq=False)
class _Turn:
    """A request that waits. `called` is its turn, or the error that it is to fail with instead."""

    request: Request
    arrived_s: float
    due_s: float  # when its first token must be there
    wait_s: float  # expected at its arrival
    called: asyncio.Future[PenstockError | None]


class Admission:
    """Owned by one router, whose `foresee` says what a request would meet now. When that changes, call `look`.

    One request at a time goes from the queue to be routed, so that the next one sees what that adds to the load.
    """

    def __init__(self, level: ServiceLevel, foresee: Callable[[Request], Forecast], measured: QueueMetrics) -> None:
        self._level = level
        self._foresee = foresee
        self._measured = measured
        self._queue = FairQueue(level.weights)
        self._turns: dict[Waiting, _Turn] = {}
        self._called: Waiting | None = None

    @asynccontextmanager
    async def admitted(self, request: Request) -> AsyncIterator[None]:
        """Entered when the request may be routed, which the block does without waiting for anything.

        Raises Overloaded, OverShare or DeadlineExceeded, and what `foresee` raises.
        """
        seen = self._foresee(request)
        if not self._turns and self._level.may_go(seen):
            yield
            return
        one = self._enter(request, seen)
        try:
            await self._wait(self._turns[one])
            yield
        finally:
            self._leave(one)

    def look(self) -> None:
        """Calls whose turn it is, if the workers can take it."""
        blocked: set[object] = set()
        while self._called is None and (one := self._queue.find_next(blocked)) is not None:
            turn = self._turns[one]
            if turn.called.done():  # cancelled, and about to leave
                self._queue.remove(one)
            elif (seen := self._find_forecast(one, turn)) is None:
                continue
            elif self._level.may_go(seen):
                self._queue.serve(one)
                self._called = one
                turn.called.set_result(None)
            else:
                blocked.add(one.lane)

    def _enter(self, request: Request, seen: Forecast) -> Waiting:
        wishes = request.constraints
        lane = (request.model, wishes.require, wishes.adapter)
        one = Waiting(wishes.tenant, wishes.priority, seen.tokens, lane)
        first_s = expected_s(seen, self._queue.tokens_ahead(one))
        self._check_limits(request, seen, first_s)
        now = clock.now()
        due_s = now + min(self._level.limit_s(seen), request.timeout_s)
        called = asyncio.get_running_loop().create_future()
        self._turns[one] = _Turn(request, now, due_s, first_s - seen.own_s, called)
        self._queue.put(one)
        while len(self._queue) > self._level.max_queued:
            self._send_away()
        self.look()
        self._measured.waiting = len(self._turns)
        return one

    def _check_limits(self, request: Request, seen: Forecast, first_s: float) -> None:
        limit_s = self._level.limit_s(seen)
        if first_s > request.timeout_s:
            raise self._too_late(request, first_s)
        if first_s > limit_s:
            count(self._measured.shed, "predicted")
            problem = f"the first token is expected in {first_s:.1f} s, and after {limit_s:.1f} s it would be too late"
            raise Overloaded(f"{problem}; try again when there is less to do", first_s - limit_s)

    def _send_away(self) -> None:
        if (one := self._queue.find_victim()) is None:
            return
        waiting, turn = len(self._queue) - 1, self._turns[one]
        if self._queue.has_rivals(one):
            tenant = one.tenant or "whoever names no tenant"
            problem = f"{waiting} requests wait, the most that may, and {tenant} has more than its share of them"
            error: Overloaded = OverShare(f"{problem}; ask for less at a time", turn.wait_s)
        else:
            error = Overloaded(f"{waiting} requests wait, the most that may; try again", turn.wait_s)
        count(self._measured.shed, "share" if isinstance(error, OverShare) else "full")
        self._queue.remove(one)
        if not turn.called.done():
            turn.called.set_result(error)

    def _find_forecast(self, one: Waiting, turn: _Turn) -> Forecast | None:
        """What `one` would meet now; None if it waited in vain, which it is told."""
        try:
            seen = self._foresee(turn.request)
            if clock.now() + seen.first_s <= turn.due_s:
                return seen
            error = self._waited_in_vain(turn, seen.first_s)
        except PenstockError as refusal:  # nobody is there any more
            error = refusal
        self._queue.remove(one)
        turn.called.set_result(error)
        return None

    async def _wait(self, turn: _Turn) -> None:
        try:
            async with asyncio.timeout_at(turn.due_s):
                error = await turn.called
        except TimeoutError:
            error = self._waited_in_vain(turn, 0.0)
        if error is not None:
            raise error
        self._measured.wait_s.observe(clock.now() - turn.arrived_s)

    def _leave(self, one: Waiting) -> None:
        del self._turns[one]
        self._queue.remove(one)
        if self._called is one:
            self._called = None
        self.look()
        self._measured.waiting = len(self._turns)

    def _waited_in_vain(self, turn: _Turn, first_s: float) -> PenstockError:
        waited_s = clock.now() - turn.arrived_s
        if turn.request.timeout_s <= turn.due_s - turn.arrived_s:
            return self._too_late(turn.request, waited_s + first_s)
        count(self._measured.shed, "late")
        late_s = max(0.0, clock.now() + first_s - turn.due_s)
        problem = f"after {waited_s:.1f} s in the queue the first token would come {late_s:.1f} s too late"
        return Overloaded(f"{problem}; try again when there is less to do", late_s)

    def _too_late(self, request: Request, first_s: float) -> DeadlineExceeded:
        count(self._measured.shed, "deadline")
        return DeadlineExceeded(
            f"the answer was to be whole {request.timeout_s:.1f} s after the request came, and not even its first "
            f"token is expected before {first_s:.1f} s"
        )
