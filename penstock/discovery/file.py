"""Discovery by a folder that workers and frontends share: one lease file for each incarnation of a worker.

    NAME.EPOCH.json         rewritten, by renaming a draft, at each renewal; removed on leaving
    NAME.EPOCH.json.draft   while it is being written

Clocks of two hosts are never compared: a reader judges silence by its own clock, from when it last saw the
content of a file change. A lease silent for `ttl_s` is not live; readers remove one that is silent for ten times
as long. The folder may be on a network file system that hangs, so only threads touch it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import msgspec

from penstock import clock
from penstock.cluster import Member, Standing
from penstock.errors import SetupError, WireError

log = logging.getLogger(__name__)

POLLS_PER_TTL = 5
DRAFT = ".draft"
LITTER_TTLS = 10  # a lease silent for so many ttls is removed


class Lease(msgspec.Struct, frozen=True):
    """The content of a lease file. `renewal` counts up, so that every renewal changes the content."""

    renewal: int
    standing: Standing


@dataclass(frozen=True, slots=True)
class Sight:
    """What a reader knows of one file. `since_s`: when it first saw this content, by its own clock."""

    content: bytes | None  # None: cannot be read
    since_s: float
    standing: Standing | None = None  # None: not a lease, or a draft of one
    problem: str = ""


class FileDiscovery:
    """Leases in `folder`, which is made where it is missing."""

    def __init__(self, folder: Path, ttl_s: float = 6.0) -> None:
        self.ttl_s = ttl_s
        self._folder = folder

    @asynccontextmanager
    async def announce(self, member: Member) -> AsyncIterator[FileAnnouncement]:
        """Raises SetupError if the folder cannot be made."""
        await asyncio.to_thread(make_folder, self._folder)
        announcement = FileAnnouncement(self._folder / file_name(member))
        try:
            await announcement.renew(Standing(member))
            yield announcement
        finally:
            await asyncio.to_thread(announcement.leave)

    async def watch(self) -> AsyncIterator[dict[str, Standing]]:
        """Raises SetupError if the folder cannot be made."""
        await asyncio.to_thread(make_folder, self._folder)
        seen: dict[str, Sight] = {}
        told: dict[str, Standing] | None = None
        while True:
            seen = await self._look(seen)
            live = live_standings(seen, clock.now(), self.ttl_s)
            if live != told:
                told = live
                yield dict(live)
            await asyncio.sleep(self.ttl_s / POLLS_PER_TTL)

    async def _look(self, before: Mapping[str, Sight]) -> dict[str, Sight]:
        """One look at the folder. What cannot be read now keeps its age and so lapses in time."""
        try:
            contents = await asyncio.to_thread(read_folder, self._folder)
        except OSError as error:
            log.warning("discovery: cannot read folder %s: %s", self._folder, error)
            return dict(before)
        seen = look(before, contents, clock.now())
        for name, sight in seen.items():
            if sight.problem and sight is not before.get(name):
                log.warning("discovery: ignoring %s: %s", self._folder / name, sight.problem)
        if silent := litter(seen, clock.now(), LITTER_TTLS * self.ttl_s):
            await asyncio.to_thread(remove, [self._folder / name for name in silent])
        return seen


class FileAnnouncement:
    """Our own lease file. The lock keeps a renewal that is still in its thread from outliving `leave`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._renewal = 0
        self._has_left = False
        self._lock = threading.Lock()

    async def renew(self, standing: Standing) -> None:
        """Raises WireError if the file cannot be written."""
        self._renewal += 1
        await asyncio.to_thread(self._write, msgspec.json.encode(Lease(self._renewal, standing)))

    def leave(self) -> None:
        with self._lock:
            self._has_left = True
            remove([self._path])

    def _write(self, content: bytes) -> None:
        draft = self._path.with_name(self._path.name + DRAFT)
        with self._lock:
            if self._has_left:
                return
            try:
                draft.write_bytes(content)
                draft.replace(self._path)
            except OSError as error:
                raise WireError(f"cannot write the lease {self._path}: {error.strerror}") from error


def file_name(member: Member) -> str:
    return f"{quote(member.worker, safe='')}.{member.epoch}.json"


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"cannot make the discovery folder {folder}: {error.strerror}") from error


def read_folder(folder: Path) -> dict[str, bytes | None]:
    """Content by file name, None for what cannot be read, in the order of names."""
    contents: dict[str, bytes | None] = {}
    for path in sorted(folder.iterdir()):
        try:
            contents[path.name] = path.read_bytes()
        except FileNotFoundError:
            continue  # left, or was renamed into place, since we listed the folder
        except OSError:
            contents[path.name] = None
    return contents


def remove(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except PermissionError:
            continue  # another user's; it lapsed already, and a reader of theirs can remove it


def look(before: Mapping[str, Sight], contents: Mapping[str, bytes | None], now: float) -> dict[str, Sight]:
    """What is known after seeing `contents`: unchanged files keep their age."""
    seen = {}
    for name, content in contents.items():
        known = before.get(name)
        seen[name] = known if known and known.content == content else first_sight(name, content, now)
    return seen


def first_sight(name: str, content: bytes | None, now: float) -> Sight:
    if content is None:
        return Sight(content, now, problem="cannot be read")
    if is_draft(name):
        return Sight(content, now)
    try:
        standing = msgspec.json.decode(content, type=Lease).standing
    except ValueError as error:  # what msgspec raises for bad JSON, wrong types and bad UTF-8
        return Sight(content, now, problem=f"not a lease ({error})")
    if name != file_name(standing.member):
        return Sight(content, now, problem=f"the lease of {file_name(standing.member)} under another name")
    return Sight(content, now, standing)


def is_draft(name: str) -> bool:
    return name.endswith(".json" + DRAFT)


def live_standings(seen: Mapping[str, Sight], now: float, ttl_s: float) -> dict[str, Standing]:
    """The newest live incarnation of every worker."""
    live: dict[str, Standing] = {}
    for sight in seen.values():
        standing = sight.standing
        if standing is None or now - sight.since_s > ttl_s:
            continue
        rival = live.get(standing.member.worker)
        if rival is None or rival.member.epoch < standing.member.epoch:
            live[standing.member.worker] = standing
    return live


def litter(seen: Mapping[str, Sight], now: float, silent_s: float) -> list[str]:
    """Leases and drafts that nobody has touched for `silent_s`. Files that are not ours are left alone."""
    return [
        name for name, sight in seen.items() if (sight.standing or is_draft(name)) and now - sight.since_s > silent_s
    ]
