"""An asyncio loop whose time jumps to the next timer: hours pass in seconds, and one seed gives one history.

Timers that tie run in the order in which they were set. What would make a run depend on the machine (threads,
sockets, subprocesses, signals) raises. When nothing is ready and no timer is set, everybody waits for somebody else:
that is a deadlock, raised with the names of the tasks and what they wait for.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
from collections.abc import Callable, Coroutine, Mapping
from contextvars import Context, ContextVar, copy_context
from typing import Any, NoReturn, TypeVar

from penstock import clock

T = TypeVar("T")

_MOST_CANCELLED = 1_000

skew_s = ContextVar("skew_s", default=0.0)  # how far the clock of the host that now runs is ahead of the loop's


class Deadlock(RuntimeError):
    """Nothing is ready and no timer is set."""


class NotVirtual(RuntimeError):
    """Something outside virtual time was asked for."""


class _NoSelector(selectors.BaseSelector):
    """Stands where asyncio wants a selector; nothing is ever registered but the loop's own wake-up pipe."""

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, 0, None)

    def get_key(self, fileobj: Any) -> NoReturn:
        raise KeyError(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return {}

    def select(self, timeout: float | None = None) -> NoReturn:
        raise NotVirtual("the virtual loop has no selector")


class _Turn:
    """What is to be called, now or at `when_s`. Offers what asyncio's handles do, and traces nothing for debugging."""

    __slots__ = ("_loop", "args", "callback", "context", "is_cancelled", "when_s")

    def __init__(
        self,
        loop: VirtualLoop,
        when_s: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: Context | None,
    ) -> None:
        self._loop = loop
        self.when_s = when_s
        self.callback = callback
        self.args = args
        self.context = copy_context() if context is None else context
        self.is_cancelled = False

    def cancel(self) -> None:
        if not self.is_cancelled:
            self.is_cancelled = True
            self.callback, self.args = _nothing, ()
            self._loop.note_cancelled()

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self.when_s


def _nothing() -> None:
    """Stands where something was that nobody should keep alive."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Starts at time 0."""

    def __init__(self) -> None:
        super().__init__(_NoSelector())
        self._now_s = 0.0
        self._order = 0
        self._timers: list[tuple[float, int, _Turn]] = []
        self._cancelled = 0  # timers that may still be among them

    def time(self) -> float:
        return self._now_s

    def host_time(self) -> float:
        """As the clock of the host that now runs has it."""
        return self._now_s + skew_s.get()

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> _Turn:
        turn = _Turn(self, self._now_s, callback, args, context)
        self._ready.append(turn)  # type: ignore[attr-defined]
        return turn

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> _Turn:
        turn = _Turn(self, when, callback, args, context)
        self._order += 1
        heapq.heappush(self._timers, (when, self._order, turn))
        return turn

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> _Turn:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def _run_once(self) -> None:
        """asyncio's own, less selector and thread-safe calls; called by run_forever."""
        ready = self._ready  # type: ignore[attr-defined]
        timers = self._timers
        if not ready:
            while timers and timers[0][2].is_cancelled:
                heapq.heappop(timers)
            if not timers:
                raise Deadlock(f"nothing is ready and no timer is set at {self._now_s:.6f} s\n{self._who_waits()}")
            self._now_s = max(self._now_s, timers[0][0])
            while timers and timers[0][0] <= self._now_s:
                turn = heapq.heappop(timers)[2]
                if not turn.is_cancelled:
                    ready.append(turn)
        for _ in range(len(ready)):
            turn = ready.popleft()
            if not turn.is_cancelled:
                try:
                    turn.context.run(turn.callback, *turn.args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    self.call_exception_handler({"message": f"{turn.callback} failed", "exception": error})

    def note_cancelled(self) -> None:
        """Cancelled timers are skipped when their time comes, or swept out once they are the most."""
        self._cancelled += 1
        if self._cancelled > _MOST_CANCELLED and 2 * self._cancelled > len(self._timers):
            self._timers = [timer for timer in self._timers if not timer[2].is_cancelled]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def _who_waits(self) -> str:
        tasks = sorted(asyncio.all_tasks(self), key=lambda task: task.get_name())
        return "\n".join(f"  {task.get_name()} in {_awaits(task)}" for task in tasks)

    def run_in_executor(self, *_: object) -> NoReturn:
        raise NotVirtual("a thread was asked for in virtual time")

    def call_soon_threadsafe(self, *_: object, **__: object) -> NoReturn:
        raise NotVirtual("another thread called into virtual time")

    def add_reader(self, *_: object) -> NoReturn:
        raise NotVirtual("a real file descriptor was watched in virtual time")

    def add_writer(self, *_: object) -> NoReturn:
        raise NotVirtual("a real file descriptor was watched in virtual time")

    async def create_connection(self, *_: object, **__: object) -> NoReturn:
        raise NotVirtual("a real socket was asked for in virtual time")

    create_server = create_unix_connection = create_unix_server = create_connection
    subprocess_exec = subprocess_shell = create_connection


def _awaits(task: asyncio.Task[Any]) -> str:
    """The chain of its coroutines down to the innermost, and the task that this one waits for, if it is one."""
    chain: list[str] = []
    coroutine: object = task.get_coro()
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        chain.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        coroutine = getattr(coroutine, "cr_await", None)
    if isinstance(other := getattr(task, "_fut_waiter", None), asyncio.Task):
        chain.append(f"task {other.get_name()}")
    return " > ".join(chain) or "?"


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` to its end in virtual time. Raises Deadlock if it can never get there."""
    loop = VirtualLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner, clock.virtual(loop.host_time):
        return runner.run(main)
