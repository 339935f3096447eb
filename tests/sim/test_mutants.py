"""Do the stories notice? A safeguard of the hand-over is taken away, and a story that still passes is too weak."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from penstock import clock
from penstock.blocks import BlockId, Region
from penstock.engine.simulated import expected_tokens
from penstock.kv.lease import Lease, LeaseTable
from penstock.request import Hop, Token
from penstock.serve.lend import Borrowing, Lender, Reclaimer
from penstock.serve.prefill import Job, Prefiller
from penstock.serve.rpc import Call
from penstock.serve.stepper import Run
from penstock.sim.loop import run_virtual
from penstock.tokens import unpack
from tests.kv import test_lease as lease_rules
from tests.sim import test_faults as stories

Story = Callable[[], None]


def no_quarantine(patch: pytest.MonkeyPatch) -> None:
    """Aborted blocks are free at once."""

    def abort(self: LeaseTable, lease_id: int) -> None:
        if (lease := self._open.pop(lease_id, None)) is not None:
            lease.state = "aborted"
            self._cache.release(lease.blocks)
            lease.blocks = []

    patch.setattr(LeaseTable, "abort", abort)


def settle_is_not_asked(patch: pytest.MonkeyPatch) -> None:
    """The decode worker takes it for granted that nobody writes any more."""

    async def ask(self: Reclaimer, lease: Lease, hop: Hop, request: str) -> None:
        return

    patch.setattr(Reclaimer, "_ask_until_settled", ask)


def settle_is_answered_at_once(patch: pytest.MonkeyPatch) -> None:
    """The prefill worker confirms in the middle of a chunk."""

    async def settle(self: Prefiller, call: Call) -> None:
        return

    patch.setattr(Prefiller, "settle", settle)


def settle_does_not_wait_for_the_step(patch: pytest.MonkeyPatch) -> None:
    """The prefill worker cancels the job, and confirms while its last chunk is being written."""

    async def stop(self: Prefiller, run: Run) -> None:
        self._stepper.leave(run, lambda: None)

    patch.setattr(Prefiller, "_stop", stop)


def abort_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A failed attempt gives back what it pinned, and not its lease."""

    def give_back(self: Lender, borrowing: Borrowing) -> None:
        self._cache.release(borrowing.pinned)

    patch.setattr(Lender, "give_back", give_back)


def pins_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A failed attempt gives back its lease, and not what it pinned."""

    def give_back(self: Lender, borrowing: Borrowing) -> None:
        if borrowing.lease is not None:
            self._reclaimer.abort(borrowing.lease, borrowing.hop, borrowing.request)

    patch.setattr(Lender, "give_back", give_back)


def commit_without_the_lease(patch: pytest.MonkeyPatch) -> None:
    """The blocks are taken over, whatever became of the lease."""

    def commit(self: Lender, lease: Lease) -> list[BlockId]:
        return lease.blocks

    patch.setattr(Lender, "commit", commit)


def leases_do_not_lapse(patch: pytest.MonkeyPatch) -> None:
    """A message counts, however long after the one before."""

    def renew(self: LeaseTable, now: float, lease_id: int) -> Lease:
        return self._open[lease_id]

    patch.setattr(LeaseTable, "_renew", renew)


def decode_starts_before_done(patch: pytest.MonkeyPatch) -> None:
    """The prefill worker says that it is done, with the right token, before it has written anything."""
    host = Prefiller._host

    def host_done(self: Prefiller, job: Job, region: Region) -> Run:
        run = host(self, job, region)
        first = expected_tokens(unpack(job.ask.tokens), job.ask.sampling, stories.SLOW)[0]
        job.first, job.ended_s = Token(first), clock.now()
        return run

    patch.setattr(Prefiller, "_host", host_done)


NOTICED_BY: Mapping[Callable[[pytest.MonkeyPatch], None], Story] = {
    no_quarantine: stories.test_a_late_write_cannot_hit_blocks_that_serve_somebody_else,
    settle_is_not_asked: stories.test_a_late_write_cannot_hit_blocks_that_serve_somebody_else,
    settle_is_answered_at_once: stories.test_a_chunk_in_progress_keeps_its_blocks_until_it_has_ended,
    settle_does_not_wait_for_the_step: stories.test_a_chunk_in_progress_keeps_its_blocks_until_it_has_ended,
    abort_is_forgotten: stories.test_clients_that_leave_at_any_time_leave_nothing_behind,
    pins_are_forgotten: stories.test_an_attempt_that_fails_gives_back_the_prefix_it_read,
    commit_without_the_lease: stories.test_prefill_in_place_is_right_and_copies_nothing,
    leases_do_not_lapse: lease_rules.test_a_message_after_expiry_aborts_by_itself,
    decode_starts_before_done: stories.test_prefill_in_place_is_right_and_copies_nothing,
}


@pytest.mark.parametrize("mutant", NOTICED_BY, ids=lambda mutant: mutant.__name__)
def test_a_story_notices(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    NOTICED_BY[mutant]()  # a story that fails anyway notices nothing
    mutant(monkeypatch)
    with pytest.raises((Exception, pytest.fail.Exception)):
        NOTICED_BY[mutant]()


@pytest.mark.parametrize("mutant", [no_quarantine, settle_is_answered_at_once], ids=lambda mutant: mutant.__name__)
def test_storms_notice(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    storms = (run_virtual(stories.stormy(seed, stories.WEATHERS["calm"])) for seed in range(40))
    assert any(not answer.is_right_so_far for answers in storms for answer in answers)
