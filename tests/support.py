"""What tests of several packages share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

T = TypeVar("T")


def run(
    coroutine: Coroutine[object, object, T],
    timeout_s: float = 30.0,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> T:
    """Runs `coroutine` on a fresh real loop, asyncio's own by default; a test that hangs fails instead."""

    async def bounded() -> T:
        async with asyncio.timeout(timeout_s):
            return await coroutine

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(bounded())


async def wait_until(is_so: Callable[[], bool]) -> None:
    """Looks again and again, and between two looks leaves the interpreter to the threads of engines."""
    while not is_so():
        await asyncio.sleep(0.001)


def without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `asyncio.to_thread` work in place, for code that touches files, in virtual time."""

    async def in_place(work: Callable[..., T], *args: object) -> T:
        return work(*args)

    monkeypatch.setattr(asyncio, "to_thread", in_place)


@contextmanager
def errors_of_loop() -> Iterator[list[BaseException]]:
    """Collects what is reported to the running loop's exception handler, instead of logging it."""
    loop = asyncio.get_running_loop()
    errors: list[BaseException] = []
    loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
    try:
        yield errors
    finally:
        loop.set_exception_handler(None)
