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
from penstock.policy.admission import Calibration, ServiceLevel, expected_s
from penstock.policy.fair_queue import FairQueue, Waiting
from penstock.policy.forecast import Forecast
from penstock.request import Request


@dataclass(slots=True, eq=False)
class _Turn:
    """A request that waits. `called` is its turn, or the error that it is to fail with instead."""

    request: Request
    arrived_s: float
    due_s: float  # when its first token must be there
    is_hurried: bool  # by its own deadline
    own_s: float  # until its first token, at least, from when it goes
    wait_s: float  # expected at its arrival
    called: asyncio.Future[PenstockError | None]
    foreseen_s: float = 0.0  # until its first token, when it was called


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
        self._calibration = Calibration()
        self._routed: dict[str, tuple[float, float]] = {}  # by request without first token: when, and what was foreseen

    @asynccontextmanager
    async def admitted(self, request: Request) -> AsyncIterator[None]:
        """Entered when the request may be routed, which the block does without waiting for anything.

        Raises Overloaded, OverShare or DeadlineExceeded, and what `foresee` raises.
        """
        foreseen = self._foresee(request)
        seen = self._calibration.corrected(foreseen)
        if not self._turns and self._level.may_go(seen):
            self._routed[request.id] = (clock.now(), foreseen.first_s)
            yield
            return
        one = self._enter(request, seen)
        turn = self._turns[one]
        try:
            await self._wait(turn)
            self._routed[request.id] = (clock.now(), turn.foreseen_s)
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
            elif not self._level.may_go(seen):
                blocked.add(one.lane)
            elif clock.now() + seen.first_s > turn.due_s:
                self._dismiss(one, self._waited_in_vain(turn, seen.first_s))
            else:
                self._queue.serve(one)
                self._called = one
                turn.called.set_result(None)

    def began(self, request: Request) -> None:
        """Its first token came. Idempotent."""
        if (routed := self._routed.pop(request.id, None)) is not None:
            at_s, first_s = routed
            self._calibration.note(first_s, clock.now() - at_s)
        self.look()

    def ended(self, request: Request) -> None:
        """It is on no worker any more. Idempotent."""
        self._routed.pop(request.id, None)
        self.look()

    def _enter(self, request: Request, seen: Forecast) -> Waiting:
        wishes = request.constraints
        lane = (request.model, wishes.require, wishes.adapter)
        one = Waiting(wishes.tenant, wishes.priority, seen.tokens, lane)
        first_s = expected_s(seen, self._queue.tokens_ahead(one))
        self._check_limits(request, seen, first_s)
        now = clock.now()
        limit_s = self._level.limit_s(seen)
        self._turns[one] = _Turn(
            request=request,
            arrived_s=now,
            due_s=now + min(limit_s, request.timeout_s),
            is_hurried=request.timeout_s <= limit_s,
            own_s=seen.own_s,
            wait_s=first_s - seen.own_s,
            called=asyncio.get_running_loop().create_future(),
        )
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
        self._dismiss(one, error)

    def _find_forecast(self, one: Waiting, turn: _Turn) -> Forecast | None:
        """What `one` would meet now; None if nobody is there to serve it, which it is told."""
        try:
            foreseen = self._foresee(turn.request)
        except PenstockError as error:
            self._dismiss(one, error)
            return None
        turn.foreseen_s = foreseen.first_s
        return self._calibration.corrected(foreseen)

    def _dismiss(self, one: Waiting, error: PenstockError) -> None:
        """`one` fails with `error`, unless it is about to leave by itself."""
        self._queue.remove(one)
        if not (called := self._turns[one].called).done():
            called.set_result(error)

    async def _wait(self, turn: _Turn) -> None:
        try:
            async with asyncio.timeout_at(turn.due_s - turn.own_s):
                error = await turn.called
        except TimeoutError:
            error = self._waited_in_vain(turn, turn.own_s)
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
        if turn.is_hurried:
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
