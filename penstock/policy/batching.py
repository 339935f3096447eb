"""What the next step computes: running sequences first, then waiting ones, while tokens and blocks last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from penstock.blocks import KvLayout


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one step. A step of `step_tokens` should take no longer than an acceptable gap between tokens."""

    step_tokens: int = 512
    max_running: int = 256

    @property
    def slots(self) -> int:
        """Sequences that may run at a time, so that each can decode in every step."""
        return min(self.max_running, self.step_tokens)


class Want(msgspec.Struct, frozen=True):
    """A sequence that has tokens to compute. Its block table has `entries`; `may_take` says whether it can get more."""

    pending_tokens: int  # 1 while decoding
    computed_tokens: int
    entries: int
    may_take: bool = True  # False: its blocks are granted by somebody else


@dataclass(slots=True)
class Batch:
    """Indices into `running` and `waiting`. `admit` and `advance` come with the number of tokens to compute."""

    advance: list[tuple[int, int]] = field(default_factory=list)
    admit: list[tuple[int, int]] = field(default_factory=list)
    preempt: list[int] = field(default_factory=list)
    starved: bool = False  # somebody who runs could not get a block


def plan_step(
    running: Sequence[Want],
    waiting: Iterable[Want],
    free_blocks: int,
    promised_blocks: int,
    layout: KvLayout,
    limits: Limits,
    may_preempt: bool = True,
) -> Batch:
    """Fills one step. Both sequences are in order of arrival; the youngest running one is preempted first.

    Who waits holds nothing yet. `promised_blocks` are kept for leases that are being written: who runs may take them,
    who waits may not. Decodes come before chunks of prefill, so a long prompt slows running streams by at most one
    step's budget. What windows leave behind comes back after each step, so a prompt takes less than its whole table.
    """
    block_tokens, width = layout.block_tokens, len(layout.keeps)
    batch = Batch()
    budget = limits.step_tokens
    alive = list(range(len(running)))
    for index in sorted(alive, key=lambda i: running[i].pending_tokens > 1):  # stable: decodes first, then by age
        if budget <= 0:
            break
        if index in batch.preempt:
            continue
        want = running[index]
        tokens = min(want.pending_tokens, budget)
        if not want.may_take:
            tokens = min(tokens, want.entries // width * block_tokens - want.computed_tokens)
        need = max(0, -(-(want.computed_tokens + tokens) // block_tokens) * width - want.entries)
        while need > free_blocks and may_preempt and (victim := _youngest(running, batch, index)) is not None:
            batch.preempt.append(victim)
            free_blocks += running[victim].entries - layout.holes(running[victim].computed_tokens)
        if need > free_blocks:
            batch.starved = True
            tokens, need = _fit(want, free_blocks, layout, budget)
        if tokens > 0:
            batch.advance.append((index, tokens))
            free_blocks -= need
            budget -= tokens
    if batch.preempt or batch.starved:
        return batch
    # Every running sequence will soon want one more block of each group.
    room = free_blocks - promised_blocks - len(running) * width
    slots = limits.slots - len(running)
    if slots <= 0 or budget <= 0:
        return batch
    for index, want in enumerate(waiting):
        need = layout.blocks_for(want.pending_tokens, limits.step_tokens)
        if need > room:
            break
        tokens = min(want.pending_tokens, budget)
        batch.admit.append((index, tokens))
        room -= need + width
        budget -= tokens
        if budget <= 0 or len(batch.admit) >= slots:
            break
    return batch


def _youngest(running: Sequence[Want], batch: Batch, asking: int) -> int | None:
    """The youngest sequence after `asking` that holds blocks of ours and is not in the step."""
    chosen = [index for index, _ in batch.advance]
    for index in range(len(running) - 1, asking, -1):
        if running[index].may_take and running[index].entries and index not in chosen and index not in batch.preempt:
            return index
    return None


def _fit(want: Want, free_blocks: int, layout: KvLayout, budget: int) -> tuple[int, int]:
    """As many tokens as the held and the free blocks hold, and the blocks that takes."""
    width = len(layout.keeps)
    room = (want.entries + free_blocks) // width * layout.block_tokens - want.computed_tokens
    tokens = max(0, min(want.pending_tokens, budget, room))
    return tokens, max(0, layout.entries_for(want.computed_tokens + tokens) - want.entries)
