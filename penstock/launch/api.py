"""The port of launchers: processes wanted, processes running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Job:
    """A process that should be running. `secrets` reach it by its environment, never by its command line."""

    name: str
    args: Sequence[str]  # of the `penstock` command
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    pass_fds: tuple[int, ...] = ()


class Launcher(Protocol):
    """Keeps jobs running until told otherwise; used as `async with`, whose end stops them all."""

    async def start(self, job: Job) -> None:
        """Starts `job` and restarts it, with back-off, whenever it dies by itself."""
        ...

    async def stop(self, name: str, grace_s: float = 30.0) -> None:
        """Drains and ends a job: asks first, kills after `grace_s`."""
        ...

    def pids(self) -> dict[str, int]:
        """Process ids of the jobs that are up."""
        ...
