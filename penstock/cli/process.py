"""What a penstock process does about its parent, its environment, signals, and its messages to people."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import resource
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from penstock.errors import SetupError
from penstock.launch.local import REFUSED

T = TypeVar("T")

PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


def end_with_parent() -> None:
    """Has the kernel send SIGTERM to this process once the launcher named in PENSTOCK_PARENT is gone.

    Called first of all in a process that a launcher started; without PENSTOCK_PARENT it does nothing.
    """
    if "PENSTOCK_PARENT" not in os.environ:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if is_orphan():  # it died before we asked
        signal.raise_signal(signal.SIGTERM)


def is_orphan() -> bool:
    """Whether the launcher that started this process is gone, so that nobody waits for it to drain."""
    return os.environ.get("PENSTOCK_PARENT", str(os.getppid())) != str(os.getppid())


GRACE_S = 30.0
ORPHAN_GRACE_S = 1.0


def grace_s() -> float:
    """How long a process that was asked to stop may take for what it has begun; nobody waits for an orphan's work."""
    return ORPHAN_GRACE_S if is_orphan() else GRACE_S


class OneThread:
    """Runs what would hold up the event loop, one after the other. The thread ends with the process."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)

    def __call__(self, work: Callable[[], T]) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self._pool, work)


def refuse(error: BaseException) -> NoReturn:
    """Ends a command that cannot start: its launcher, or else standard error, is told why in one line.

    Of a group only the first error is told: people mend one at a time.
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    reason = " ".join(str(error).split())
    if "PENSTOCK_REFUSAL" in os.environ:
        os.write(int(os.environ["PENSTOCK_REFUSAL"]), reason.encode())
    else:
        print(f"penstock: error: {reason}", file=sys.stderr)
    sys.exit(REFUSED)


def token() -> str:
    """What processes of one server must know, from PENSTOCK_TOKEN. Raises SetupError where there is none."""
    if not (found := os.environ.get("PENSTOCK_TOKEN", "")):
        raise SetupError("PENSTOCK_TOKEN is not set: `penstock serve` prints the one that its workers need")
    return found


def token_or_new() -> tuple[str, bool]:
    """The token from PENSTOCK_TOKEN, or a new one; and whether it is new."""
    found = os.environ.get("PENSTOCK_TOKEN", "")
    return (found, False) if found else (secrets.token_urlsafe(24), True)


def api_key(given: str) -> str:
    """The key as given, or from PENSTOCK_API_KEY."""
    return given or os.environ.get("PENSTOCK_API_KEY", "")


def upstream_key() -> str:
    """The key that servers behind a router want, from PENSTOCK_UPSTREAM_KEY."""
    return os.environ.get("PENSTOCK_UPSTREAM_KEY", "")


def unique_name() -> str:
    """A name for a worker that got none."""
    return f"{socket.gethostname()}-{os.getpid()}"


def own_command() -> list[str]:
    """What to type to run `penstock` again: by its name where a shell finds it, else as this process was run."""
    if shutil.which("penstock"):
        return ["penstock"]
    script = Path(sys.argv[0])
    return [str(script)] if script.name == "penstock" else [sys.executable, "-m", "penstock"]


def log_to_stderr(name: str, level: str) -> None:
    """Prints log messages of this process, which people know as `name`."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format=f"%(asctime)s {name} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a worker or a frontend on uvloop, with as many open files, so connections, as it may have."""
    import uvloop

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


def stop_requested() -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets; a second one of the same kind kills the process.

    Its children, if it is a launcher, follow at once. Called on the running loop, in the main thread.
    """
    loop = asyncio.get_running_loop()
    requested = asyncio.Event()

    def request(number: int) -> None:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
        requested.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, request, number)
    return requested
