"""Sessions of turns, lazily and in order of their start, what can be made of them, and how they are played.

A prompt is named by blocks of 512 tokens, as in Mooncake's traces: equal ids are equal text. A session is a
conversation: the prompt of a turn is all that was said and answered before, then the turn's own blocks. So turns
depend on answers, and a turn comes `after_s` after the end of the one before it, however long that took.

    trace = mooncake(path).faster(4).limited(1_000)      nothing is read yet
    await play(merged(trace, agents.delayed(600)), ask)  as time goes on
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from heapq import merge
from itertools import islice, takewhile

from penstock.tokens import TOKEN_BYTES

BLOCK_TOKENS = 512
SPELLED_BLOCKS = 16_384  # whose text is kept at hand: 32 MiB


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: `tokens` more tokens, spelled by `blocks`, of which the last may be cut."""

    tokens: int
    blocks: Sequence[int]  # of ids in [0, 2**63)
    output_tokens: int
    after_s: float = 0.0  # the end of the turn before; the first: the start of the session


@dataclass(frozen=True, slots=True)
class Session:
    """One conversation. It starts `start_s` after the workload did."""

    id: str
    start_s: float
    turns: Sequence[Turn]
    tenant: str = ""  # tenants share no cached blocks


class Workload:
    """Sessions in order of their start. Every pass over it starts anew and yields the same; it may have no end."""

    def __init__(self, sessions: Callable[[], Iterator[Session]]) -> None:
        self._sessions = sessions

    def __iter__(self) -> Iterator[Session]:
        return self._sessions()

    def faster(self, factor: float) -> Workload:
        """Sessions start `factor` times as often. Pauses inside them stay: people do not think faster."""
        return self._each(lambda session: replace(session, start_s=session.start_s / factor))

    def delayed(self, by_s: float) -> Workload:
        return self._each(lambda session: replace(session, start_s=session.start_s + by_s))

    def until(self, end_s: float) -> Workload:
        """Only sessions that start before `end_s`."""
        return Workload(lambda: takewhile(lambda session: session.start_s < end_s, self))

    def limited(self, sessions: int) -> Workload:
        """Only the first so many."""
        return Workload(lambda: islice(self, sessions))

    def of_requests(self, requests: int) -> Workload:
        """Only so many turns, counted by session: the last session may be cut."""
        return Workload(lambda: _first_requests(self, requests))

    def truncated(self, prompt_tokens: int, output_tokens: int) -> Workload:
        """At most so many tokens per request. First prompts are cut; a session ends where a later one would not fit."""
        return self._each(lambda session: replace(session, turns=_cut(session.turns, prompt_tokens, output_tokens)))

    def of_tenant(self, tenant: str) -> Workload:
        return self._each(lambda session: replace(session, tenant=tenant))

    def apart(self, name: str) -> Workload:
        """Shares no text with what is not set apart under this name."""

        def renamed(turn: Turn) -> Turn:
            return replace(turn, blocks=[_renamed_block(block, name) for block in turn.blocks])

        return self._each(lambda s: replace(s, id=f"{name}/{s.id}", turns=tuple(renamed(turn) for turn in s.turns)))

    def then(self, other: Workload, gap_s: float = 0.0) -> Workload:
        """`other` begins `gap_s` after the last session of this one has started."""
        return Workload(lambda: _in_turn((self, other), gap_s))

    def repeated(self, times: int, gap_s: float = 0.0) -> Workload:
        """One after the other; every copy has text of its own."""
        return Workload(lambda: _in_turn((self.apart(f"copy {copy}") for copy in range(times)), gap_s))

    def _each(self, change: Callable[[Session], Session]) -> Workload:
        return Workload(lambda: map(change, self))


def merged(*workloads: Workload) -> Workload:
    """All of them together; of sessions that start at once, those of the earlier argument come first."""
    return Workload(lambda: merge(*workloads, key=lambda session: session.start_s))


def _in_turn(parts: Iterable[Workload], gap_s: float) -> Iterator[Session]:
    begin_s = end_s = 0.0
    for part in parts:
        for session in part.delayed(begin_s):
            end_s = session.start_s
            yield session
        begin_s = end_s + gap_s


def _first_requests(sessions: Iterable[Session], requests: int) -> Iterator[Session]:
    for session in sessions:
        yield session if len(session.turns) <= requests else replace(session, turns=session.turns[:requests])
        requests -= len(session.turns)
        if requests <= 0:
            return


def _cut(turns: Iterable[Turn], prompt_tokens: int, output_tokens: int) -> tuple[Turn, ...]:
    kept: list[Turn] = []
    said = 0
    for turn in turns:
        if kept and said + turn.tokens > prompt_tokens:
            break
        tokens = min(turn.tokens, prompt_tokens)
        outputs = min(turn.output_tokens, output_tokens)
        kept.append(replace(turn, tokens=tokens, blocks=turn.blocks[: blocks_for(tokens)], output_tokens=outputs))
        said += tokens + outputs
    return tuple(kept)


# Text


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


@lru_cache(maxsize=1024)
def _first_block(name: str) -> int:
    """Where the ids of `name` begin: 2**32 of them, other than those of any other name, and than small numbers."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest()) >> 33 << 32


def _renamed_block(block: int, name: str) -> int:
    return _first_block(f"{block >> 32} {name}") + block % 2**32


class BlockSupply:
    """Ids of blocks that nobody else has, for who invents text. Equal names get equal ids."""

    def __init__(self, name: str) -> None:
        self._next = _first_block(name)

    def take(self, tokens: int) -> range:
        """As many as so many tokens need."""
        taken = range(self._next, self._next + blocks_for(tokens))
        self._next = taken.stop
        return taken


def spell(blocks: Sequence[int], tokens: int) -> bytes:
    """The text of `blocks`, cut to `tokens`, packed as in `penstock.tokens`: the 8 bytes of each id, 64 times.

    So unequal blocks differ in every 8 tokens, and token ids are below 256, which every vocabulary has.
    """
    return b"".join(map(_spell_block, blocks))[: tokens * TOKEN_BYTES]


@lru_cache(maxsize=SPELLED_BLOCKS)
def _spell_block(block: int) -> bytes:
    tokens = bytearray(8 * TOKEN_BYTES)
    tokens[::TOKEN_BYTES] = block.to_bytes(8, "little")  # the lowest byte of each token
    return bytes(tokens) * (BLOCK_TOKENS // 8)


class Conversation:
    """What was said and answered so far in one session. Keeps names of blocks and answers, not the whole text."""

    def __init__(self) -> None:
        self._parts: list[Turn | bytes] = []

    def say(self, turn: Turn) -> bytes:
        """The whole prompt of `turn`, which comes next; packed tokens."""
        self._parts.append(turn)
        if len(self._parts) == 1:
            return spell(turn.blocks, turn.tokens)
        return b"".join([part if isinstance(part, bytes) else spell(part.blocks, part.tokens) for part in self._parts])

    def hear(self, answer: bytes) -> None:
        """Packed tokens."""
        self._parts.append(answer)


# Playing

Ask = Callable[[Session, Turn, bytes], Awaitable[bytes | None]]


async def play(workload: Iterable[Session], ask: Ask) -> None:
    """Asks everything in its time, counted from now on, and returns when the last answer is there.

    `ask` gets the session, the turn and its prompt, and returns the answer, both as packed tokens; None if there is no
    answer, which ends the session. What it raises ends everything.
    """
    await start_each(workload, lambda session: _play_session(session, ask))


async def start_each(workload: Iterable[Session], live: Callable[[Session], Coroutine[None, None, None]]) -> None:
    """Has each session live from its start on, counted from now, and returns when all are over.

    What one of them raises ends everything.
    """
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    async with asyncio.TaskGroup() as group:
        for session in workload:
            await _sleep_until(begun_s + session.start_s)
            group.create_task(live(session), name=session.id)


async def _play_session(session: Session, ask: Ask) -> None:
    conversation = Conversation()
    for turn in session.turns:
        await asyncio.sleep(turn.after_s)
        answer = await ask(session, turn, conversation.say(turn))
        if answer is None:
            return
        conversation.hear(answer)


async def _sleep_until(when_s: float) -> None:
    """Exactly until then; `asyncio.sleep` adds the difference to the time, and sums round."""
    loop = asyncio.get_running_loop()
    if when_s <= loop.time():
        return
    reached = loop.create_future()
    timer = loop.call_at(when_s, reached.set_result, None)
    try:
        await reached
    finally:
        timer.cancel()
