"""The local launcher with real, small processes, which report through a pipe that they inherit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from penstock.launch.api import Job
from penstock.launch.local import FIRST_DELAY_S, MAX_DELAY_S, JobRefused, LocalLauncher, restart_delay_s
from tests.support import run

# A job's arguments: file descriptor to report to, behaviour.
FAKE = """
import os, signal, sys
from penstock.cli.process import end_with_parent, refuse
end_with_parent()
report, behaviour = int(sys.argv[1]), sys.argv[2]
say = lambda text: os.write(report, f"{text} {os.getpid()}\\n".encode())
if behaviour == "drains":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
if behaviour == "ignores":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour.startswith("/"):
    try:
        os.mkdir(behaviour)
    except FileExistsError:
        refuse("later")
say(os.environ.get("SECRET", "up"))
if behaviour == "refuses":
    refuse("no such\\nmodel")
if behaviour.isdigit():
    sys.exit(int(behaviour))
if behaviour == "drains":
    signal.sigwait([signal.SIGTERM])
    say("drained")
else:
    signal.pause()
"""
COMMAND = (sys.executable, "-c", FAKE)


class Reports:
    """The reading end of the pipe that jobs report to."""

    def __init__(self) -> None:
        self._read_fd, self.write_fd = os.pipe()

    def job(self, name: str, behaviour: str, **secrets: str) -> Job:
        return Job(name, (str(self.write_fd), behaviour), secrets, (self.write_fd,))

    async def next(self) -> tuple[str, int]:
        """What the next report says, and the process id of who says it."""
        ready = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._read_fd, ready.set)
        await ready.wait()
        loop.remove_reader(self._read_fd)
        line = b""
        while not line.endswith(b"\n"):
            line += os.read(self._read_fd, 1)
        word, pid = line.decode().split()
        return word, int(pid)

    def close(self) -> None:
        os.close(self._read_fd)
        os.close(self.write_fd)


@pytest.fixture
def reports() -> Iterator[Reports]:
    with contextlib.closing(Reports()) as reports:
        yield reports


class Pauses:
    """Stands in for asyncio.sleep: returns at once, but for ever holds who asks after `limit` times."""

    def __init__(self, limit: int = 1000) -> None:
        self.delays_s: list[float] = []
        self.limit_reached = asyncio.Event()
        self._limit = limit

    async def __call__(self, delay_s: float) -> None:
        self.delays_s.append(delay_s)
        if len(self.delays_s) == self._limit:
            self.limit_reached.set()
            await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def launcher(pauses: Pauses | None = None, grace_s: float = 20.0) -> AsyncIterator[LocalLauncher]:
    async with LocalLauncher(os.environ, COMMAND, grace_s, pauses or Pauses()) as it:
        yield it


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def open_fds() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def is_reaped(pid: int) -> bool:
    """Whether `pid` is no child of ours any more, not even as a zombie."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def test_a_killed_job_is_started_again(reports: Reports) -> None:
    async def scenario() -> None:
        async with launcher() as local:
            await local.start(reports.job("a", "stays"))
            _, first = await reports.next()
            assert local.pids() == {"a": first}
            os.kill(first, signal.SIGKILL)
            _, second = await reports.next()
            assert second != first
            assert local.pids() == {"a": second}
            assert is_reaped(first)

    run(scenario())


def test_jobs_that_keep_dying_wait_longer_and_longer(reports: Reports) -> None:
    async def scenario() -> None:
        pauses = Pauses(limit=8)
        async with launcher(pauses) as local:
            await local.start(reports.job("a", "1"))
            await pauses.limit_reached.wait()
            assert local.pids() == {}
        assert pauses.delays_s == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]

    run(scenario())


def test_a_job_that_was_up_for_long_starts_over_with_a_short_wait() -> None:
    assert restart_delay_s(MAX_DELAY_S, up_s=31.0) == FIRST_DELAY_S
    assert restart_delay_s(MAX_DELAY_S, up_s=29.0) == MAX_DELAY_S


def test_a_job_that_refuses_to_start_ends_the_launcher_and_the_other_jobs(reports: Reports) -> None:
    async def scenario() -> None:
        with pytest.raises(JobRefused, match=r"^no such model$"):
            async with launcher() as local:
                await local.start(reports.job("a", "drains"))
                await reports.next()
                await local.start(reports.job("b", "refuses"))
                await asyncio.Event().wait()
        assert [(await reports.next())[0] for _ in range(2)] == ["up", "drained"]

    run(scenario())


def test_an_error_in_the_block_drains_the_jobs_too(reports: Reports) -> None:
    async def scenario() -> None:
        with pytest.raises(KeyError):
            async with launcher() as local:
                await local.start(reports.job("a", "drains"))
                await reports.next()
                raise KeyError
        assert (await reports.next())[0] == "drained"

    run(scenario())


def test_a_job_that_refuses_only_a_later_start_is_tried_again(reports: Reports, tmp_path: Path) -> None:
    async def scenario() -> None:
        pauses = Pauses(limit=3)
        async with launcher(pauses) as local:
            await local.start(reports.job("a", str(tmp_path / "has run")))
            _, pid = await reports.next()
            os.kill(pid, signal.SIGKILL)
            await pauses.limit_reached.wait()

    run(scenario())


def test_stopping_drains_and_does_not_start_again(reports: Reports) -> None:
    async def scenario() -> None:
        pauses = Pauses()
        async with launcher(pauses) as local:
            await local.start(reports.job("a", "drains"))
            up = await reports.next()
            await local.stop("a")
            assert await reports.next() == ("drained", up[1])
            assert local.pids() == {}
            assert is_reaped(up[1])
        assert pauses.delays_s == []

    run(scenario())


@pytest.mark.parametrize("state", ["ignores", "frozen"])
def test_a_job_that_does_not_end_in_time_is_killed(reports: Reports, state: str) -> None:
    async def scenario() -> None:
        async with launcher() as local:
            await local.start(reports.job("a", state))
            _, pid = await reports.next()
            if state == "frozen":
                os.kill(pid, signal.SIGSTOP)
            await local.stop("a", grace_s=0.01)
            assert is_reaped(pid)

    run(scenario())


def test_a_job_can_be_stopped_between_two_lives(reports: Reports) -> None:
    async def scenario() -> None:
        pauses = Pauses(limit=1)
        async with launcher(pauses) as local:
            await local.start(reports.job("a", "1"))
            await pauses.limit_reached.wait()
            await local.stop("a")

    run(scenario())


def test_two_jobs_cannot_have_one_name(reports: Reports) -> None:
    async def scenario() -> None:
        async with launcher() as local:
            await local.start(reports.job("a", "stays"))
            with pytest.raises(ValueError, match="named a"):
                await local.start(reports.job("a", "stays"))

    run(scenario())


def test_secrets_travel_in_the_environment(reports: Reports) -> None:
    async def scenario() -> None:
        async with launcher() as local:
            job = reports.job("a", "stays", SECRET="hush")
            await local.start(job)
            word, pid = await reports.next()
            assert word == "hush"
            assert "hush" not in command_line(pid)
            assert "hush" not in repr(job)

    run(scenario())


def test_nothing_is_left_behind(reports: Reports) -> None:
    async def scenario() -> None:
        before = open_fds()
        async with launcher() as local:
            for name in "abc":
                await local.start(reports.job(name, "drains"))
            pids = [(await reports.next())[1] for _ in "abc"]
            os.kill(pids[0], signal.SIGKILL)
            pids.append((await reports.next())[1])
        assert all(is_reaped(pid) for pid in pids)
        assert open_fds() == before

    run(scenario())


LAUNCH = f"""
import asyncio, os, sys
from penstock.launch.api import Job
from penstock.launch.local import LocalLauncher
async def main():
    async with LocalLauncher(os.environ, (sys.executable, "-c", {FAKE!r})) as local:
        for name in "ab":
            await local.start(Job(name, (sys.argv[1], "stays"), pass_fds=(int(sys.argv[1]),)))
        await asyncio.Event().wait()
asyncio.run(main())
"""


def test_jobs_die_with_a_killed_launcher_even_a_frozen_one(reports: Reports) -> None:
    async def up() -> list[int]:
        return [(await reports.next())[1] for _ in "ab"]

    fd = reports.write_fd
    with subprocess.Popen([sys.executable, "-c", LAUNCH, str(fd)], pass_fds=[fd]) as process:
        pids = run(up())
        pidfds = [os.pidfd_open(pid) for pid in pids]
        os.kill(pids[0], signal.SIGSTOP)
        process.kill()
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], 20.0)[0], "a job outlived its launcher"
        os.close(pidfd)


def test_a_job_whose_launcher_is_gone_already_ends_at_once(reports: Reports) -> None:
    environment = {**os.environ, "PENSTOCK_PARENT": str(os.getppid())}
    command = [*COMMAND, str(reports.write_fd), "stays"]
    done = subprocess.run(command, env=environment, pass_fds=[reports.write_fd], timeout=20, check=False)
    assert done.returncode == -signal.SIGTERM
