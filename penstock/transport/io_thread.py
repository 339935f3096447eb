"""An event loop in a thread of its own, for sockets whose bytes must not hold up the loop of the worker."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import ParamSpec, Self, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class IoThread:
    """Runs what it is given while inside the block. Asked from one other loop, whichever kind that is."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread

    async def __aenter__(self) -> Self:
        # Not uvloop, even where the worker runs on it: callbacks here must see a socket that stays ready again.
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._main, name=self._name, daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """What still runs there is cancelled."""
        await self.run_out(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Has `work` called there soon, in the order of asking."""
        self._loop.call_soon_threadsafe(lambda: work(*args, **kwargs))

    async def run(self, work: Coroutine[object, object, T]) -> T:
        """What `work`, awaited there, returns or raises. Cancelling cancels it without waiting for its end."""
        return await asyncio.wrap_future(self._submit(work))

    async def run_out(self, work: Coroutine[object, object, T]) -> T:
        """As `run`, but lets `work` come to its end when cancelled, before it passes that on."""
        running = asyncio.wrap_future(self._submit(work))
        cancelled: asyncio.CancelledError | None = None
        while not running.done():
            try:
                await asyncio.shield(running)
            except asyncio.CancelledError as error:
                cancelled = error
            except Exception:
                break  # raised below
        if cancelled is not None:
            raise cancelled
        return running.result()

    def _submit(self, work: Coroutine[object, object, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def on_loop(on_moved: Callable[[], None]) -> Callable[[], None]:
    """To be called on the I/O thread: calls `on_moved` on this loop, once for all calls that it has not yet seen."""
    loop, is_due = asyncio.get_running_loop(), threading.Event()

    def call() -> None:
        is_due.clear()
        on_moved()

    def ask() -> None:
        if not is_due.is_set():
            is_due.set()
            loop.call_soon_threadsafe(call)

    return ask
