"""What only the folder of leases has to answer for: other people's files, litter, and clocks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from penstock.cluster import Standing
from penstock.discovery.file import FileDiscovery, file_name, first_sight, litter, live_standings, look
from penstock.errors import SetupError, WireError
from penstock.sim.loop import run_virtual
from tests.conformance.test_discovery import member
from tests.support import run, without_threads

LEASE = b'{"renewal":%d,"standing":{"member":{"worker":"a","epoch":%d,"role":"any","model":"demo","addresses":[],'
LEASE += b'"layout":{"layers":1,"kv_heads":1,"head_dim":1,"block_tokens":1,"dtype":"float32"},"blocks":1,'
LEASE += b'"max_context_tokens":1}}}'


def lease(epoch: int = 1, renewal: int = 1) -> bytes:
    return LEASE % (renewal, epoch)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def first_view(folder: Path) -> dict[str, Standing]:
    async with aclosing(FileDiscovery(folder).watch()) as views:
        return await anext(views)


def test_one_lease_file_while_inside_and_nothing_afterwards(tmp_path: Path) -> None:
    async def scenario() -> None:
        discovery = FileDiscovery(tmp_path / "made" / "leases")
        async with discovery.announce(member("a", epoch=7)):
            assert files(tmp_path / "made" / "leases") == ["a.7.json"]
            assert list(await first_view(tmp_path / "made" / "leases")) == ["a"]
        assert files(tmp_path / "made" / "leases") == []

    run(scenario())


GARBAGE: dict[str, Callable[[Path], object]] = {
    "notes.txt": lambda path: path.write_text("not for you"),
    "half.1.json": lambda path: path.write_bytes(lease()[:40]),
    "empty.1.json": lambda path: path.write_bytes(b""),
    "binary.1.json": lambda path: path.write_bytes(b"\xff\x00"),
    "other.1.json": lambda path: path.write_bytes(lease()),
    "folder.1.json": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_ignored_with_a_warning_that_names_it(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    GARBAGE[name](tmp_path / name)
    (tmp_path / "a.1.json").write_bytes(lease())
    assert list(run(first_view(tmp_path))) == ["a"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert name in caplog.text
    assert (tmp_path / name).exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def announce() -> None:
        async with FileDiscovery(tmp_path / "file").announce(member("a")):
            pass

    with pytest.raises(SetupError, match="discovery folder"):
        run(announce())
    with pytest.raises(SetupError, match="discovery folder"):
        run(first_view(tmp_path / "file" / "below"))


def test_a_renewal_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with FileDiscovery(tmp_path / "leases").announce(member("a")) as entry:
            await asyncio.to_thread((tmp_path / "leases" / "a.1.json").unlink)
            await asyncio.to_thread((tmp_path / "leases").rmdir)
            with pytest.raises(WireError, match=r"a\.1\.json"):
                await entry.renew(Standing(member("a")))

    run(scenario())


def test_a_reader_that_cannot_read_keeps_what_it_knew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        (tmp_path / "leases").mkdir()
        (tmp_path / "leases" / "a.1.json").write_bytes(lease())
        async with aclosing(FileDiscovery(tmp_path / "leases", ttl_s=0.2).watch()) as views:
            assert list(await anext(views)) == ["a"]
            (tmp_path / "leases").rename(tmp_path / "elsewhere")
            assert await anext(views) == {}  # lapsed like any other that is silent

    run(scenario())
    assert "cannot read folder" in caplog.text


def test_silence_counts_from_when_the_reader_saw_the_content_change() -> None:
    name = file_name(member("a"))
    seen = look({}, {name: lease(renewal=1)}, now=100.0)
    seen = look(seen, {name: lease(renewal=1)}, now=104.0)
    assert list(live_standings(seen, now=106.0, ttl_s=6.0)) == ["a"]
    assert list(live_standings(seen, now=106.1, ttl_s=6.0)) == []
    seen = look(seen, {name: lease(renewal=2)}, now=107.0)
    assert list(live_standings(seen, now=113.0, ttl_s=6.0)) == ["a"]


def test_an_older_incarnation_counts_again_only_once_the_newer_is_gone() -> None:
    old, new = file_name(member("a", 1)), file_name(member("a", 2))
    seen = look({}, {new: lease(2)}, now=0.0)
    seen = look(seen, {old: lease(1), new: lease(2)}, now=5.0)
    assert live_standings(seen, now=6.0, ttl_s=6.0)["a"].member.epoch == 2
    assert live_standings(seen, now=7.0, ttl_s=6.0)["a"].member.epoch == 1


def test_only_leases_and_drafts_that_nobody_touches_are_litter() -> None:
    contents = {file_name(member("a")): lease(), "a.1.json.draft": b"{", "notes.txt": b"", ".gitkeep": b""}
    seen = look({}, contents, now=0.0)
    assert litter(seen, now=60.0, silent_s=60.0) == []
    assert litter(seen, now=61.0, silent_s=60.0) == ["a.1.json", "a.1.json.draft"]


def test_readers_remove_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.1.json").write_bytes(lease())
    (tmp_path / "b.1.json.draft").write_bytes(b"{")
    (tmp_path / "notes.txt").write_text("not ours")

    async def read_for(duration_s: float) -> None:
        async with aclosing(FileDiscovery(tmp_path, ttl_s=6.0).watch()) as views:
            try:
                async with asyncio.timeout(duration_s):
                    async for _ in views:
                        pass
            except TimeoutError:
                pass  # it would read for ever

    without_threads(monkeypatch)
    run_virtual(read_for(59.0))
    assert files(tmp_path) == ["a.1.json", "b.1.json.draft", "notes.txt"]
    run_virtual(read_for(62.0))
    assert files(tmp_path) == ["notes.txt"]


def test_a_draft_is_never_taken_for_a_lease() -> None:
    assert first_sight("a.1.json.draft", lease(), now=0.0).standing is None
