"""Do the stories notice? A safeguard of the hand-over is taken away, and a story that still passes is too weak."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple
from functools import partial

import pytest
from msgspec.structs import replace

from penstock import clock
from penstock.blocks import BlockId, KvLayout, Region
from penstock.engine.simulated import expected_tokens
from penstock.kv.lease import Lease, LeaseTable
from penstock.kv.prefix_cache import PrefixCache
from penstock.policy.liveness import Patience
from penstock.request import Hop, Progress, Request, Token
from penstock.serve.decode import Decoder, Output, Sequence
from penstock.serve.handoff import Fetched
from penstock.serve.job import Job
from penstock.serve.lend import Borrowing, Lender, Reclaimer
from penstock.serve.paths import Conduit, Shared
from penstock.serve.prefill import Prefiller
from penstock.serve.resident import Resident
from penstock.serve.router import Router
from penstock.serve.rpc import Call
from penstock.serve.stepper import Run, Stepper
from penstock.serve.stream import Stream
from penstock.serve.streamed import _WriteThrough
from penstock.sim import transport as fabric
from penstock.sim.transport import _Export, _Pipe
from penstock.tokens import unpack
from penstock.transport.api import Moved
from tests.kv import test_lease as lease_rules
from tests.sim import test_faults as stories
from tests.sim import test_progress as progress
from tests.sim import test_recovery as recovery
from tests.sim import test_storms as storms
from tests.sim import test_streamed as streamed
from tests.sim import test_transport as transports
from tests.sim import test_windows as windows

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
            self._reclaimer.abort(borrowing.lease, borrowing.hop, borrowing.request, borrowing.transfer)

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


def pipes_stay_open(patch: pytest.MonkeyPatch) -> None:
    """A transfer that was left goes on."""

    def close(self: _Pipe, why: str) -> None:
        self._export.pipes.pop(self, None)
        self.gone.set()

    patch.setattr(_Pipe, "close", close)


def blocks_under_way_are_not_held(patch: pytest.MonkeyPatch) -> None:
    """What a pipe reads from is the run's alone."""
    push = _WriteThrough.push

    def push_and_let_go(self: _WriteThrough, conduit: Conduit) -> bool:
        is_rest = push(self, conduit)
        self.release()
        return is_rest

    patch.setattr(_WriteThrough, "push", push_and_let_go)


def first_token_binds_nobody(patch: pytest.MonkeyPatch) -> None:
    """The client gets the first token, and whoever goes on samples it again."""

    def send(self: Decoder, sequence: Sequence, token: Token) -> None:
        sequence.call.send(Output([token]))

    patch.setattr(Decoder, "_on_first", send)


def done_before_flush(patch: pytest.MonkeyPatch) -> None:
    """Done is said while bytes are still under way."""

    async def flush(self: Conduit) -> None:
        return

    patch.setattr(Conduit, "is_at_rest", True)
    patch.setattr(Conduit, "flush", flush)


def owner_knows_no_writer(patch: pytest.MonkeyPatch) -> None:
    """A writer connects unseen, as if after it was granted blocks: the owner takes it for gone."""

    async def fence(self: _Export, writer: str, request: str) -> None:
        return

    patch.setattr(_Export, "fence", fence)


def offers_do_not_age(patch: pytest.MonkeyPatch) -> None:
    """The region of a worker's next incarnation is taken for that of the one before."""
    patch.setattr(fabric, "check", lambda offer, current: None)


def preempted_prefills_keep_what_they_sent(patch: pytest.MonkeyPatch) -> None:
    """Their blocks are held until the pipe is left, though they may be what they lack to start again."""
    release = _WriteThrough.release

    def release_at_the_end(self: _WriteThrough) -> None:
        if self._job.first is not None:
            release(self)

    patch.setattr(_WriteThrough, "release", release_at_the_end)


def no_token_from_who_computes_before_it_is_granted_blocks(patch: pytest.MonkeyPatch) -> None:
    """All is computed when the first blocks are granted, and the first token is forgotten."""
    tell_first = Job.tell_first

    def tell_first_if_granted(self: Job) -> None:
        if self.first is not None and self.granted is None:
            self.is_first_told = True
        tell_first(self)

    patch.setattr(Job, "tell_first", tell_first_if_granted)


def fetched_blocks_are_kept_unasked(patch: pytest.MonkeyPatch) -> None:
    """A prefix that was read is taken for what was asked for, though it may have changed meanwhile."""

    async def release(self: Job) -> None:
        self.call.send(Fetched())

    patch.setattr(Job, "release", release)


def a_block_is_lost_where_the_way_changes(patch: pytest.MonkeyPatch) -> None:
    """The next way goes on after the block that failed."""
    moved = _Pipe.moved.fget  # type: ignore[attr-defined]

    def moved_with_the_next(self: _Pipe) -> Moved:
        found: Moved = moved(self)
        return Moved(found.blocks + 1, *astuple(found)[1:])

    patch.setattr(_Pipe, "moved", property(moved_with_the_next))


def a_way_that_was_left_is_not_fenced_off(patch: pytest.MonkeyPatch) -> None:
    """Neither when the way changes, nor when the lease is aborted."""

    async def fence(self: Shared, writer: str, transfer: str) -> None:
        return

    patch.setattr(Shared, "fence", fence)
    patch.setattr(Shared, "fence_off", fence)


def the_last_token_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Who goes on with a stream is not told the last token that the client has, and makes it again."""
    so_far = Stream._so_far

    def without_the_last(self: Stream) -> Request:
        request = so_far(self)
        return replace(request, progress=Progress(request.progress.tokens[:-4]))

    patch.setattr(Stream, "_so_far", without_the_last)


def outputs_are_counted_anew(patch: pytest.MonkeyPatch) -> None:
    """Who goes on with a stream makes as many tokens as were asked for, whatever the client has."""
    generate = Sequence.__init__

    def init(self: Sequence, *args: object) -> None:
        generate(self, *args)  # type: ignore[arg-type]
        self.outputs = 0

    patch.setattr(Sequence, "__init__", init)


def streams_of_draining_workers_stay(patch: pytest.MonkeyPatch) -> None:
    """They are cut off when their worker's patience ends."""
    patch.setattr(Router, "_move_streams", lambda self: None)


def work_that_waits_is_taken_for_a_call(patch: pytest.MonkeyPatch) -> None:
    """An engine is expected to compute whenever somebody waits for something at its worker."""
    patch.setattr(Stepper, "call_s", property(lambda self: 0.02 if self.waiting or self.running else 0.0))


def slow_is_dead(patch: pytest.MonkeyPatch) -> None:
    """Every engine has the same time for a step."""
    patch.setattr(Patience, "bound_s", lambda self, steps, step_s: self.floor_s if step_s else self.idle_s)


def stalled_workers_get_requests(patch: pytest.MonkeyPatch) -> None:
    """Only their streams are taken away."""
    patch.setattr(Router, "_usable", lambda self, roster, tried, avoided: roster.fleet(tried, avoided))


def more_steps_than_are_left(patch: pytest.MonkeyPatch) -> None:
    """Steps that are alike go on past the last token."""
    count_alike = Stepper._count_alike

    def count(self: Stepper, chosen: list[tuple[Run, int]]) -> int:
        steps = count_alike(self, chosen)
        return steps + 1 if steps > 1 else 1

    patch.setattr(Stepper, "_count_alike", count)


def windows_are_kept_whole(patch: pytest.MonkeyPatch) -> None:
    """Nothing is given back that no later token reads."""
    patch.setattr(Resident, "_trim", lambda self: None)


def windows_are_a_block_too_short(patch: pytest.MonkeyPatch) -> None:
    """The oldest block that the next token reads is given back."""
    forgotten = KvLayout.forgotten

    def one_more(self: KvLayout, before: int, tokens: int) -> list[int]:
        return forgotten(self, before, tokens + self.block_tokens)

    patch.setattr(KvLayout, "forgotten", one_more)


def what_is_yet_to_be_written_is_taken_over(patch: pytest.MonkeyPatch) -> None:
    """What windows will leave behind is used again before the writer has come that far."""
    commit_behind = Lender.commit_behind

    def commit_ahead(self: Lender, borrowing: Borrowing, lease: Lease, tokens: int) -> None:
        commit_behind(self, borrowing, lease, min(borrowing.tokens, tokens + 3 * windows.CHUNK))

    patch.setattr(Lender, "commit_behind", commit_ahead)


def what_windows_left_behind_stays_lent(patch: pytest.MonkeyPatch) -> None:
    """A prompt that is computed in place holds all of it until its end."""
    patch.setattr(Lender, "commit_behind", lambda self, borrowing, lease, tokens: None)


def prefixes_are_found_without_their_windows(patch: pytest.MonkeyPatch) -> None:
    """What keeps all is found, whatever became of the windows."""
    patch.setattr(PrefixCache, "_find_lacking", lambda self, hashes, length: None)


NOTICED_BY: Mapping[Callable[[pytest.MonkeyPatch], None], Story] = {
    no_quarantine: partial(stories.test_a_late_write_cannot_hit_blocks_that_serve_somebody_else, is_streamed=False),
    settle_is_not_asked: partial(
        stories.test_a_late_write_cannot_hit_blocks_that_serve_somebody_else, is_streamed=False
    ),
    settle_is_answered_at_once: partial(
        stories.test_a_chunk_in_progress_keeps_its_blocks_until_it_has_ended, is_streamed=False
    ),
    settle_does_not_wait_for_the_step: partial(
        stories.test_a_chunk_in_progress_keeps_its_blocks_until_it_has_ended, is_streamed=False
    ),
    abort_is_forgotten: partial(stories.test_clients_that_leave_at_any_time_leave_nothing_behind, is_streamed=False),
    pins_are_forgotten: stories.test_an_attempt_that_fails_gives_back_the_prefix_it_read,
    commit_without_the_lease: stories.test_prefill_in_place_is_right_and_copies_nothing,
    leases_do_not_lapse: lease_rules.test_a_message_after_expiry_aborts_by_itself,
    decode_starts_before_done: stories.test_prefill_in_place_is_right_and_copies_nothing,
    pipes_stay_open: streamed.test_an_owner_that_dies_in_mid_transfer_takes_nothing_of_the_writer_along,
    blocks_under_way_are_not_held: streamed.test_a_prefill_preempted_in_mid_transfer_sends_all_the_same,
    preempted_prefills_keep_what_they_sent: partial(
        streamed.test_a_prefill_that_is_preempted_is_not_in_its_own_way, bytes_per_s=1_000
    ),
    no_token_from_who_computes_before_it_is_granted_blocks: (
        streamed.test_many_writers_are_granted_no_more_than_arrives_and_do_not_all_wait_for_all
    ),
    first_token_binds_nobody: partial(
        streamed.test_prefill_killed_after_the_first_token_the_stream_goes_on_with_it, others=()
    ),
    done_before_flush: streamed.test_the_first_token_does_not_wait_for_the_kv_and_the_second_does,
    owner_knows_no_writer: streamed.test_blocks_of_a_transfer_that_goes_on_are_not_used_again,
    offers_do_not_age: transports.test_an_offer_of_an_incarnation_before_is_stale,
    fetched_blocks_are_kept_unasked: streamed.test_a_prefix_that_was_let_go_while_it_was_read_is_not_kept,
    a_block_is_lost_where_the_way_changes: streamed.test_a_way_that_breaks_down_in_mid_transfer_is_replaced_by_the_next,
    a_way_that_was_left_is_not_fenced_off: streamed.test_blocks_of_a_transfer_that_goes_on_are_not_used_again,
    the_last_token_is_forgotten: partial(
        recovery.test_a_stream_goes_on_elsewhere_with_the_tokens_it_would_have_had, seed=0, is_streamed=False
    ),
    outputs_are_counted_anew: partial(
        recovery.test_a_stream_goes_on_elsewhere_with_the_tokens_it_would_have_had, seed=0, is_streamed=False
    ),
    streams_of_draining_workers_stay: partial(
        recovery.test_a_worker_that_drains_hands_its_streams_over_at_once, is_streamed=False
    ),
    work_that_waits_is_taken_for_a_call: (
        progress.test_a_prefill_worker_that_waits_for_a_frozen_decode_worker_does_not_stand_still
    ),
    slow_is_dead: partial(progress.test_a_worker_with_long_steps_is_slow_and_not_dead, is_streamed=False),
    stalled_workers_get_requests: partial(
        progress.test_streams_of_a_decode_engine_that_freezes_end_whole_elsewhere, is_streamed=False
    ),
    windows_are_kept_whole: partial(
        windows.test_a_long_sequence_holds_its_full_part_and_its_windows, windows.HOME, windows.STEP
    ),
    windows_are_a_block_too_short: partial(
        windows.test_a_long_sequence_holds_its_full_part_and_its_windows, windows.HOME, windows.STEP
    ),
    what_is_yet_to_be_written_is_taken_over: partial(
        windows.test_a_pool_that_is_too_small_for_all_of_everything_is_enough, windows.HANDED_OVER, is_streamed=False
    ),
    what_windows_left_behind_stays_lent: partial(
        windows.test_a_long_sequence_holds_its_full_part_and_its_windows, windows.HANDED_OVER, 2 * windows.CHUNK
    ),
    prefixes_are_found_without_their_windows: windows.test_a_prefix_whose_windows_were_evicted_is_not_found,
    more_steps_than_are_left: streamed.test_no_step_is_made_past_the_last_token,
}


@pytest.mark.parametrize("mutant", NOTICED_BY, ids=lambda mutant: mutant.__name__)
def test_a_story_notices(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    NOTICED_BY[mutant]()  # a story that fails anyway notices nothing
    mutant(monkeypatch)
    with pytest.raises((Exception, pytest.fail.Exception)):
        NOTICED_BY[mutant]()


@pytest.mark.parametrize(
    "mutant",
    [no_quarantine, settle_is_answered_at_once, abort_is_forgotten, done_before_flush, first_token_binds_nobody],
    ids=lambda mutant: mutant.__name__,
)
def test_storms_notice(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="PENSTOCK_STORM"):
        for seed in range(1_000):
            storms.check(seed)
