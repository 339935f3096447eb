"""Processes on this machine, as children of the launcher.

    start -> up -> dies by itself -> back-off -> up -> ...
              `--> stop: SIGTERM, then SIGKILL after a grace -> gone

Children are watched and signalled through pidfds: no thread waits, and a reused process id gets no signal.
A child learns from its environment (`penstock.cli.process` is the other side)

    PENSTOCK_PARENT    the launcher's process id; the child has the kernel end it when that process dies
    PENSTOCK_REFUSAL   a file descriptor; a child that refuses to start writes the reason there and exits with 2

and gets a process group of its own: Ctrl-C reaches only the launcher, which then stops its children in good order,
and the kernel wakes a frozen child when the launcher dies, so that it can end too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from penstock import clock
from penstock.errors import SetupError
from penstock.launch.api import Job

log = logging.getLogger(__name__)

FIRST_DELAY_S = 0.2
MAX_DELAY_S = 10.0
STEADY_S = 30.0  # a job that was up for so long starts over with the shortest delay
REFUSED = 2  # exit status of a `penstock` command that refused to start


class JobRefused(SetupError):
    """A job refused to start, for the reason it gave; starting it again would not help."""


def restart_delay_s(last_s: float, up_s: float) -> float:
    """The wait before starting a job that died after `up_s`. `last_s` is the previous wait, 0 at first."""
    if last_s == 0 or up_s >= STEADY_S:
        return FIRST_DELAY_S
    return min(2 * last_s, MAX_DELAY_S)


@dataclass(slots=True)
class _Kept:
    """A job that should be running. Its task does everything that happens to it, and alone sets `pid`."""

    job: Job
    grace_s: float
    pid: int | None = None
    is_started: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] = field(init=False)


class LocalLauncher:
    """Keeps jobs running as children of this process.

    `environment` is what they inherit, `command` what runs a job's arguments, `pause` how to wait. A job that
    refuses its first start ends the `async with` block with JobRefused.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        command: Sequence[str] = (sys.executable, "-P", "-m", "penstock"),
        grace_s: float = 30.0,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._environment = {**environment, "PENSTOCK_PARENT": str(os.getpid())}
        self._command = command
        self._grace_s = grace_s
        self._pause = pause
        self._kept: dict[str, _Kept] = {}
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> LocalLauncher:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops all jobs at once. Raises what the block or the first failed job raised."""
        if error is None:  # else the task group cancels them; being cancelled twice means to kill at once
            for kept in self._kept.values():
                kept.task.cancel()
        try:
            await self._tasks.__aexit__(kind, error, trace)
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed

    async def start(self, job: Job) -> None:
        """Returns when its process has been started; whether it is ready is for others to ask."""
        if job.name in self._kept:
            raise ValueError(f"a job named {job.name} is running already")
        kept = self._kept[job.name] = _Kept(job, self._grace_s)
        kept.task = self._tasks.create_task(self._keep(kept), name=f"keep {job.name}")
        await kept.is_started.wait()

    async def stop(self, name: str, grace_s: float = 30.0) -> None:
        kept = self._kept.pop(name)
        kept.grace_s = grace_s
        kept.task.cancel()
        await asyncio.wait([kept.task])

    def pids(self) -> dict[str, int]:
        return {name: kept.pid for name, kept in self._kept.items() if kept.pid is not None}

    async def _keep(self, kept: _Kept) -> None:
        """Runs the job again and again; being cancelled is how it is stopped."""
        delay_s = 0.0
        while True:
            started_s = clock.now()
            status, reason = await self._run(kept)
            if status == REFUSED and delay_s == 0:
                raise JobRefused(reason or f"{kept.job.name} refused to start")
            delay_s = restart_delay_s(delay_s, clock.now() - started_s)
            log.warning("%s %s; starting it again in %.1f s", kept.job.name, fate(status), delay_s)
            await self._pause(delay_s)

    async def _run(self, kept: _Kept) -> tuple[int, str]:
        """One process of the job from start to end; returns its exit status and why it refused, if it did."""
        job = kept.job
        environment = {**self._environment, **job.secrets}
        with Child([*self._command, *job.args], environment, job.pass_fds) as child:
            kept.pid = child.pid
            kept.is_started.set()
            try:
                return await child.wait(), child.refusal()
            finally:
                if child.status is None:
                    await child.end(kept.grace_s)
                kept.pid = None


class Child:
    """One process, started by entering. Only this object waits for it, and so may signal it without a race.

    The block must not be left before `wait` or `end` has returned.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], pass_fds: Sequence[int]) -> None:
        self._command = command
        self._environment = environment
        self._pass_fds = pass_fds

    def __enter__(self) -> Child:
        self._refusal = os.memfd_create("refusal")
        try:
            self._process = subprocess.Popen(
                self._command,
                env={**self._environment, "PENSTOCK_REFUSAL": str(self._refusal)},
                stdin=subprocess.DEVNULL,
                pass_fds=(*self._pass_fds, self._refusal),
                process_group=0,
            )
        except BaseException:
            os.close(self._refusal)
            raise
        self._pidfd = os.pidfd_open(self._process.pid)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._pidfd)
        os.close(self._refusal)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Exit status, or minus the number of the signal that killed it; None until `wait` has returned."""
        return self._process.returncode

    def refusal(self) -> str:
        """Why it refused to start, in its own words."""
        return os.pread(self._refusal, 4096, 0).decode(errors="replace")

    async def wait(self) -> int:
        """Waits for the end and reaps the process."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._pidfd)
        return self._process.wait()

    async def end(self, grace_s: float) -> None:
        """Asks the process to end, and kills it after `grace_s`, or at once if cancelled meanwhile."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self.wait()
        except TimeoutError:
            log.warning("process %d did not end within %.0f s of SIGTERM; killing it", self.pid, grace_s)
        finally:
            if self.status is None:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                await self.wait()


def fate(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
