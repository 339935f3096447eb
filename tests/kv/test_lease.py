"""Leases: what lapses is lost, what may still be written is not reused, what is committed is the sequence's."""

from __future__ import annotations

import pytest

from penstock.errors import LeaseLost, OutOfBlocks
from penstock.kv.lease import LeaseTable
from penstock.kv.prefix_cache import PrefixCache


def make(blocks: int = 8, lease_s: float = 5.0) -> tuple[PrefixCache, LeaseTable]:
    cache = PrefixCache(blocks)
    return cache, LeaseTable(cache, lease_s)


def test_a_lease_grows_by_chunk_and_is_committed() -> None:
    cache, leases = make()
    lease = leases.open(0.0, "p:1", needed_blocks=5)
    assert leases.promised_blocks == 5
    first = list(leases.grow(1.0, lease.id, 2))
    assert list(leases.grow(1.5, lease.id, 2)) == first  # a repeated request changes nothing
    leases.wrote(2.0, lease.id)
    assert lease.state == "receiving"
    both = list(leases.grow(3.0, lease.id, 99))
    assert both[:2] == first and len(both) == 5  # never more than the prompt needs
    assert leases.commit(4.0, lease.id) == both
    assert (leases.leased_blocks, leases.promised_blocks, cache.available) == (0, 0, 3)
    cache.release(both)
    cache.check_integrity()


def test_silence_loses_the_lease_and_its_blocks_wait_for_the_writer() -> None:
    cache, leases = make()
    lease = leases.open(0.0, "p:1", 3)
    leases.grow(0.0, lease.id, 3)
    leases.touch(5.0, lease.id)
    for late in (leases.wrote, leases.touch, leases.commit):
        with pytest.raises(LeaseLost):
            late(10.1, lease.id)
    assert (cache.available, cache.quarantined) == (5, 3)
    leases.settle(lease.id)
    leases.settle(lease.id)
    assert (cache.available, cache.quarantined) == (8, 0)
    cache.check_integrity()


def test_a_message_after_expiry_aborts_by_itself() -> None:
    cache, leases = make()
    lease = leases.open(0.0, "p:1", 2)
    leases.grow(0.0, lease.id, 2)
    with pytest.raises(LeaseLost, match=r"lapsed after 6.0 s of silence; prefill again, or raise --lease-s"):
        leases.commit(6.0, lease.id)
    assert lease.state == "aborted"
    assert cache.quarantined == 2


def test_progress_keeps_a_lease_alive() -> None:
    _, leases = make()
    lease = leases.open(0.0, "p:1", 2)
    for now in range(1, 60):
        leases.touch(float(now), lease.id)
    leases.commit(61.0, lease.id)


def test_an_aborted_lease_without_blocks_needs_no_quarantine() -> None:
    cache, leases = make()
    lease = leases.open(0.0, "p:1", 2)
    leases.abort(lease.id)
    leases.abort(lease.id)
    assert lease.state == "aborted"
    assert (cache.available, cache.quarantined) == (8, 0)


def test_abort_cannot_undo_a_commit() -> None:
    cache, leases = make()
    lease = leases.open(0.0, "p:1", 2)
    leases.grow(0.0, lease.id, 2)
    blocks = leases.commit(0.0, lease.id)
    leases.abort(lease.id)
    assert lease.state == "committed" and cache.quarantined == 0
    cache.release(blocks)


def test_growth_beyond_the_pool_is_refused_and_loses_nothing() -> None:
    cache, leases = make(blocks=3)
    lease = leases.open(0.0, "p:1", 5)
    leases.grow(0.0, lease.id, 2)
    with pytest.raises(OutOfBlocks):
        leases.grow(0.0, lease.id, 5)
    assert len(lease.blocks) == 2 and cache.available == 1


def test_the_youngest_lease_is_the_one_to_call_off() -> None:
    _, leases = make()
    assert leases.youngest_open() is None
    first, second = leases.open(0.0, "p:1", 1), leases.open(1.0, "p:1", 1)
    assert leases.youngest_open() is second
    leases.abort(second.id)
    assert leases.youngest_open() is first
