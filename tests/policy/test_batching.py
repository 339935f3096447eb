"""Forming a step: budgets hold, decodes come first, memory is never promised twice, and somebody always advances."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.blocks import KvLayout
from penstock.policy.batching import Limits, Want, plan_step

BLOCK = 4
LAYOUT = KvLayout(1, 1, 1, BLOCK, "float32")


def decode(computed: int) -> Want:
    return Want(1, computed, -(-computed // BLOCK))


def waiting(tokens: int) -> Want:
    return Want(tokens, 0, 0)


def plan(running: list[Want], queue: list[Want], free: int, promised: int = 0, tokens: int = 16, **more: bool):  # type: ignore[no-untyped-def]
    return plan_step(running, queue, free, promised, LAYOUT, Limits(step_tokens=tokens, max_running=8), **more)


def test_decodes_come_before_an_older_prompt_that_is_being_prefilled() -> None:
    batch = plan([Want(100, 8, 2), decode(5), decode(6)], [], free=50)
    assert batch.advance == [(1, 1), (2, 1), (0, 14)]


def test_a_long_prompt_is_cut_into_chunks() -> None:
    assert plan([], [waiting(100)], free=50).admit == [(0, 16)]


def test_a_prompt_is_admitted_only_if_all_of_it_fits_beside_promises_and_growth() -> None:
    assert plan([], [waiting(16)], free=4).admit == [(0, 16)]
    assert plan([], [waiting(16)], free=4, promised=1).admit == []
    assert plan([decode(5)], [waiting(16)], free=4).admit == []


def test_the_queue_keeps_its_order_even_if_a_smaller_one_would_fit() -> None:
    assert plan([], [waiting(40), waiting(4)], free=5).admit == []


def test_the_youngest_is_preempted_for_the_oldest() -> None:
    batch = plan([decode(8), decode(6), decode(7)], [waiting(4)], free=0)
    assert batch.preempt == [2]
    assert batch.advance == [(0, 1), (1, 1)]
    assert batch.admit == []


def test_nobody_is_preempted_while_leases_can_be_called_off() -> None:
    batch = plan([decode(8), decode(6)], [], free=0, may_preempt=False)
    assert batch.starved and not batch.preempt
    assert batch.advance == [(1, 1)]


def test_a_guest_gets_no_more_than_it_was_granted() -> None:
    batch = plan([Want(10, 0, 2, may_take=False)], [], free=0)
    assert batch.advance == [(0, 8)]


wants = st.builds(
    lambda pending, computed, extra: Want(pending, computed, -(-computed // BLOCK) + extra),
    st.integers(1, 40),
    st.integers(0, 40),
    st.integers(0, 2),
)


@given(
    st.lists(wants, max_size=10),
    st.lists(st.integers(1, 60).map(waiting), max_size=6),
    *(st.integers(0, 20), st.integers(0, 10), st.integers(1, 32), st.booleans()),
)
def test_a_step_keeps_its_bounds(
    running: list[Want], queue: list[Want], free: int, promised: int, tokens: int, may_preempt: bool
) -> None:
    batch = plan(running, queue, free, promised, tokens, may_preempt=may_preempt)
    parts = [(running[i], n) for i, n in batch.advance] + [(queue[i], n) for i, n in batch.admit]
    assert sum(n for _, n in parts) <= tokens
    assert all(0 < n <= want.pending_tokens for want, n in parts)
    need = sum(max(0, -(-(want.computed_tokens + n) // BLOCK) - want.entries) for want, n in parts)
    assert need <= free + sum(running[i].entries for i in batch.preempt)
    assert not set(batch.preempt) & {i for i, _ in batch.advance}
    assert [i for i, _ in batch.admit] == list(range(len(batch.admit)))
    if running and may_preempt and not batch.advance:
        assert batch.starved  # only a lone sequence that fills the pool may be stuck
