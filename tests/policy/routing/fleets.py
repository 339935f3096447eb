"""Fleets of one's choice, made as a router makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from penstock.blocks import KvLayout
from penstock.cluster import Load, Member, Role, Standing, StepPrices
from penstock.policy.routing.api import Ask, Fleet
from penstock.policy.routing.roster import Roster
from penstock.policy.routing.ways import Rung, Wiring

LAYOUT = KvLayout(2, 2, 4, 64, "bfloat16")
BLOCKS = 1_000


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker and its report, in short. `cached` is what it is believed to hold of the prompt that is asked."""

    name: str
    role: Role = "any"
    memory: str = "host"
    domain: str = ""
    queued: int = 0
    waiting: int = 0
    running: int = 0
    used_blocks: int = 0
    tokens_per_s: float = 0.0
    step_s: float = 0.0
    prices: StepPrices | None = None
    cached: int = 0
    is_draining: bool = False
    epoch: int = 1

    @property
    def standing(self) -> Standing:
        member = Member(
            worker=self.name,
            epoch=self.epoch,
            role=self.role,
            model="m",
            addresses=(f"memory:{self.name}",),
            layout=LAYOUT,
            blocks=BLOCKS,
            max_context_tokens=100_000,
            memory=self.memory,
            domain=self.domain,
            device=self.name,
        )
        load = Load(
            queued_tokens=self.queued,
            waiting=self.waiting,
            running=self.running,
            blocks=BLOCKS,
            free_blocks=BLOCKS - self.used_blocks,
            prefill_tokens_per_s=self.tokens_per_s,
            decode_step_s=self.step_s,
            step_prices=self.prices,
        )
        return Standing(member, load, self.is_draining)


class Rows:
    """A tree: workers stand in rows of the first letter of their names, and rows in one hall."""

    def climb(self, device: str) -> Sequence[Rung]:
        own = (1 + ord(device[-1]) % 3) * 1e-9
        row, hall = f"row {device[0]}", ("gate", device[0])
        return [Rung(row, own, own, 1e-5, device, device), Rung("hall", 4e-9, 4e-9, 1e-4, hall, hall)]


def roster_of(workers: Sequence[Worker], wiring: Wiring | None = None) -> Roster:
    roster = Roster(wiring)
    roster.update({worker.name: worker.standing for worker in workers}, 0.0)
    return roster


def fleet_of(workers: Sequence[Worker], wiring: Wiring | None = None) -> Fleet:
    return roster_of(workers, wiring).fleet(0.0)


def ask_of(workers: Sequence[Worker], prompt_tokens: int, max_tokens: int = 100, number: int = 0) -> Ask:
    cached = [float(min(worker.cached, prompt_tokens - 1)) for worker in workers if not worker.is_draining]
    return Ask(number, prompt_tokens, max_tokens, LAYOUT.token_bytes, np.array(cached), np.zeros(len(cached)))


def some_workers(roles: Sequence[Role] = ("prefill", "decode", "any")) -> st.SearchStrategy[list[Worker]]:
    """Up to eight, none of them draining."""
    worker = st.builds(
        Worker,
        name=st.text("abcdefghij", min_size=1, max_size=4),
        role=st.sampled_from(roles),
        memory=st.sampled_from(["one", "other", ""]),
        domain=st.sampled_from(["net", ""]),
        queued=st.integers(0, 10_000),
        waiting=st.integers(0, 200),
        running=st.integers(0, 200),
        used_blocks=st.integers(0, BLOCKS),
        tokens_per_s=st.sampled_from([0.0, 500.0, 20_000.0]),
        step_s=st.sampled_from([0.0, 0.005, 0.05]),
        cached=st.integers(0, 4_000),
    )
    return st.lists(worker, min_size=1, max_size=8, unique_by=lambda each: each.name)
