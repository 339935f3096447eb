"""Blocks that are lent in place, against writers whose messages are late and who write on after they were given up.

A writer does what it can see to be allowed; nobody else may then have a block that it reads or writes, and what is
found in the cache must be what belongs there.
"""

from __future__ import annotations

from array import array
from collections.abc import Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.blocks import BlockId, Keeps, KvLayout
from penstock.engine.api import Past
from penstock.errors import PenstockError
from penstock.kv.lease import LeaseTable
from penstock.kv.prefix_cache import PrefixCache
from penstock.request import Hop, Sampling
from penstock.serve.handoff import Begin, Granted, More, NoRoom, Wrote
from penstock.serve.lend import Borrowing, Lender, LendOptions
from penstock.serve.resident import Resident
from penstock.serve.stepper import Run

BLOCK, BLOCKS = 4, 60
KEEPS: list[tuple[Keeps, ...]] = [("all",), ("all", 6, 6), (3,), ("all", 20), (1, "all"), (9, 2)]

Content = tuple[object, ...]  # what a block holds: prompt, group, column, up to which token; or whose it is


@dataclass(slots=True, eq=False)
class Writer:
    """A prefill worker's side of one attempt: what it has been told, and how far it is."""

    family: int
    borrowing: Borrowing
    chunk_tokens: int
    heard: list[Granted | NoRoom]  # what the owner said and has not arrived
    said: list[Wrote | More] = field(default_factory=list)
    table: list[BlockId] = field(default_factory=list)
    computed: int = 0
    has_begun: bool = False
    is_given_up: bool = False


class Lending(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.writers: list[Writer] = []
        self.others: list[tuple[int, list[BlockId]]] = []
        self.content: dict[BlockId, Content] = {}
        self.names = 0

    @initialize(keeps=st.sampled_from(KEEPS))
    def open(self, keeps: tuple[Keeps, ...]) -> None:
        self.layout = KvLayout(1, 1, 1, BLOCK, "float32", keeps=keeps)
        self.cache = PrefixCache(BLOCKS, reads=self.layout.reads)
        self.leases = LeaseTable(self.cache, lease_s=1e9)
        stepper: Any = Owner(self.cache, self.leases)
        shared: Any = SimpleNamespace(region=SimpleNamespace(layout=self.layout))
        endpoint: Any = SimpleNamespace(spawn=never)
        self.lender = Lender(self.cache, self.leases, stepper, shared, endpoint, LendOptions())

    @rule(family=st.integers(0, 1), tokens=st.integers(1, 70), chunk_tokens=st.integers(1, 20))
    def begin(self, family: int, tokens: int, chunk_tokens: int) -> None:
        self.names += 1
        prompt = array("I", range(family * 1000, family * 1000 + tokens))
        region: Any = SimpleNamespace(layout=self.layout)
        run = Run(region, Past(str(self.names), prompt, tokens), Sampling(1), lambda _: None, lambda _: None)
        heard: list[Granted | NoRoom] = []
        call: Any = SimpleNamespace(send=heard.append)
        resident = Resident(run, self.cache, self.layout, "")
        borrowing = Borrowing(self.lender, resident, run.past.sequence, Hop("p", 1, ()), call, lambda _: None)
        if borrowing._begin(Begin(chunk_tokens)):
            self.writers.append(Writer(family, borrowing, chunk_tokens, heard))
        else:
            borrowing.end()

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), tokens=st.integers(1, 40))
    def act(self, data: st.DataObject, tokens: int) -> None:
        """One thing happens; others are late."""
        writer = data.draw(st.sampled_from(self.writers))
        match data.draw(st.sampled_from(["read", "compute", "hear"])):
            case "read":
                self.read(writer)
            case "compute":
                self.compute(writer, tokens)
            case _:
                self.hear(writer)

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), rounds=st.integers(1, 10), tokens=st.integers(1, 40))
    def go_on(self, data: st.DataObject, rounds: int, tokens: int) -> None:
        """For a while nothing is late: then it is never without blocks for a step."""
        writer = data.draw(st.sampled_from(self.writers))
        for _ in range(rounds):
            while writer.said and not writer.is_given_up:
                self.hear(writer)
            while writer.heard:
                self.read(writer)
            if not writer.is_given_up:
                granted = len(writer.table) // len(self.layout.keeps) * BLOCK
                assert granted > writer.computed or writer.computed == writer.borrowing.tokens, "it waits for ever"
            self.compute(writer, tokens)

    def read(self, writer: Writer) -> None:
        """A grant arrives."""
        if writer.heard and isinstance(granted := writer.heard.pop(0), Granted):
            if not writer.has_begun:
                writer.has_begun, writer.computed = True, granted.start
            if len(granted.blocks) > len(writer.table):
                writer.table = granted.blocks

    def compute(self, writer: Writer, tokens: int) -> None:
        """A step, as the writer may take it who knows of nothing else."""
        width, before = len(self.layout.keeps), writer.computed
        end = min(before + tokens, writer.borrowing.tokens, len(writer.table) // width * BLOCK)
        if end <= before:
            return
        for entry in self.layout.kept(range(self.layout.entries_for(before)), before):
            if not writer.is_given_up:
                assert self.cache._pool._references[writer.table[entry]], "what it reads may be taken by others"
                assert self.content[writer.table[entry]] == self.belongs(writer, entry, before)
        for entry in range(before // BLOCK * width, self.layout.entries_for(end)):
            block = writer.table[entry]
            held = self.cache._pool._references[block] == 1 and block not in self.cache._name_of
            assert block in self.cache._pool._quarantined if writer.is_given_up else held, (
                "what it writes is not its own"
            )
            self.content[block] = self.belongs(writer, entry, end)
        writer.computed = end
        writer.said += [Wrote(end), More(min(writer.borrowing.tokens, end + 2 * writer.chunk_tokens))]

    def hear(self, writer: Writer) -> None:
        """What it said arrives."""
        if writer.said and not writer.is_given_up:
            try:
                finish(writer.borrowing._answer(writer.said.pop(0)))
            except PenstockError:
                self.give_up(writer)

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def commit_or_lose(self, data: st.DataObject) -> None:
        writer = data.draw(st.sampled_from(self.writers))
        if writer.is_given_up:
            return
        if writer.computed < writer.borrowing.tokens or writer.said:
            self.give_up(writer)
            return
        resident = writer.borrowing.resident
        resident.run.blocks, resident.run.computed = writer.borrowing.commit(), writer.computed
        for entry in self.layout.kept(range(len(resident.run.blocks)), writer.computed):
            assert self.content[resident.run.blocks[entry]] == self.belongs(writer, entry, writer.computed)
        resident.publish()
        writer.borrowing.end()
        self.cache.release(resident.run.blocks)
        self.writers.remove(writer)

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        writer = data.draw(st.sampled_from(self.writers))
        if writer.is_given_up and writer.borrowing.lease is not None:
            self.leases.settle(writer.borrowing.lease.id)
            self.writers.remove(writer)

    @rule(count=st.integers(1, 20))
    def take(self, count: int) -> None:
        """Others, who may take what is promised as well."""
        if count <= self.cache.available:
            self.names += 1
            self.others.append((self.names, self.cache.take(count)))
            self.content |= dict.fromkeys(self.others[-1][1], (self.names,))

    @precondition(lambda self: self.others)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name, blocks = self.others.pop(data.draw(st.integers(0, len(self.others) - 1)))
        assert all(self.content[block] == (name,) for block in blocks), "somebody wrote what was not theirs"
        self.cache.release(blocks)

    @invariant()
    def accounts_balance(self) -> None:
        self.cache.check_integrity()
        held = sum(1 for count in self.cache._pool._references if count)
        assert self.cache.available == BLOCKS - held - self.cache.quarantined

    def teardown(self) -> None:
        for writer in self.writers:
            self.give_up(writer)
            if writer.borrowing.lease is not None:
                self.leases.settle(writer.borrowing.lease.id)
        for _, blocks in self.others:
            self.cache.release(blocks)
        assert (self.cache.available, self.leases.promised_blocks, self.lender._lent) == (BLOCKS, 0, {})

    def give_up(self, writer: Writer) -> None:
        if not writer.is_given_up:
            writer.is_given_up = True
            writer.borrowing.end()

    def belongs(self, writer: Writer, entry: int, computed: int) -> Content:
        column, group = divmod(entry, len(self.layout.keeps))
        return (writer.family, group, column, min(computed, (column + 1) * BLOCK))


class Owner:
    """What a lender needs of its worker's stepper."""

    free_slots = 8

    def __init__(self, cache: PrefixCache, leases: LeaseTable) -> None:
        self._cache = cache
        self._leases = leases

    @property
    def spare_blocks(self) -> int:
        return self._cache.available - self._leases.promised_blocks

    def wake(self) -> None:
        return


def never(task: Coroutine[object, object, object]) -> None:
    """When a writer has settled is for the test to say."""
    task.close()


def finish(answer: Coroutine[object, object, None]) -> None:
    """Runs what waits for nothing."""
    try:
        answer.send(None)
    except StopIteration:
        return
    raise AssertionError("it waits for something")


TestLending = Lending.TestCase
TestLending.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
