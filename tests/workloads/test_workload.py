"""What can be made of workloads, how text is spelled, and that turns wait for answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import count, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import clock
from penstock.blocks import chain_hashes
from penstock.sim.loop import run_virtual
from penstock.tokens import count as count_tokens
from penstock.tokens import pack, unpack
from penstock.workloads.workload import (
    BLOCK_TOKENS,
    Ask,
    BlockSupply,
    Conversation,
    Session,
    Turn,
    Workload,
    blocks_for,
    merged,
    play,
    spell,
)


def asks(*starts_s: float, name: str = "s", first_block: int = 0) -> Workload:
    """One turn each, of one block of its own."""
    return Workload(
        lambda: iter(
            [Session(f"{name}{n}", start_s, (Turn(512, [first_block + n], 5),)) for n, start_s in enumerate(starts_s)]
        )
    )


def seen(workload: Workload) -> list[tuple[str, float]]:
    return [(session.id, session.start_s) for session in workload]


def blocks(workload: Workload) -> list[int]:
    return [block for session in workload for turn in session.turns for block in turn.blocks]


def endless() -> Workload:
    return Workload(lambda: (Session(f"e{n}", float(n), (Turn(1, [n], 1),)) for n in count()))


# What can be made of them


def test_rate_offset_and_limits_read_no_further_than_they_must() -> None:
    assert seen(endless().faster(4).delayed(10).limited(3)) == [("e0", 10.0), ("e1", 10.25), ("e2", 10.5)]
    assert seen(endless().until(2.0)) == [("e0", 0.0), ("e1", 1.0)]


def test_every_pass_starts_anew() -> None:
    workload = merged(endless().limited(5), asks(0.5, 1.5)).faster(2)
    assert seen(workload) == seen(workload) != []


def test_merged_keeps_the_order_of_starts_and_ties_go_to_the_first() -> None:
    both = merged(asks(0, 2, 4, name="a"), asks(1, 2, 3, name="b"))
    assert [name for name, _ in seen(both)] == ["a0", "b0", "a1", "b1", "b2", "a2"]
    assert len(list(islice(merged(endless(), endless()), 10))) == 10


def test_then_and_repeated_go_on_where_the_last_session_started() -> None:
    assert [start for _, start in seen(asks(1, 3).then(asks(0, 2), gap_s=10))] == [1, 3, 13, 15]
    assert [start for _, start in seen(asks(1, 3).repeated(3, gap_s=1))] == [1, 3, 5, 7, 9, 11]


def test_copies_and_what_is_set_apart_share_no_text() -> None:
    one = asks(0, 1, 2, first_block=7)
    everything = merged(one, one.apart("x"), one.apart("x").apart("x"), one.apart("y"), one.repeated(2).repeated(2))
    assert len(set(blocks(everything))) == len(blocks(everything)) == 3 * 8
    assert blocks(one.apart("x")) == blocks(one.apart("x"))
    assert all(0 <= block < 2**63 for block in blocks(everything))


def test_prefixes_stay_shared_inside_what_is_set_apart() -> None:
    shared = Workload(lambda: iter([Session("a", 0, (Turn(1500, [1, 2, 3], 1),)), Session("b", 0, (Turn(9, [1], 1),))]))
    first, second = shared.apart("x")
    assert first.turns[0].blocks[0] == second.turns[0].blocks[0]


def test_of_requests_counts_turns_and_cuts_the_last_session() -> None:
    chat = Workload(lambda: iter([Session(name, 0, (Turn(9, [1], 1),) * 3) for name in "abc"]))
    assert [len(session.turns) for session in chat.of_requests(4)] == [3, 1]
    assert [len(session.turns) for session in chat.of_requests(6)] == [3, 3]
    assert len(list(endless().of_requests(2))) == 2


def test_truncated_cuts_first_prompts_and_ends_sessions_that_outgrow_it() -> None:
    long = Session("long", 0, (Turn(2_000, [1, 2, 3, 4], 900),))
    chat = Session("chat", 0, (Turn(600, [5, 6], 300), Turn(100, [7], 300), Turn(200, [8], 300)))
    cut, kept = Workload(lambda: iter([long, chat])).truncated(prompt_tokens=1_025, output_tokens=200)
    assert cut.turns == (Turn(1_025, [1, 2, 3], 200),)
    assert kept.turns == (Turn(600, [5, 6], 200), Turn(100, [7], 200))  # a third prompt would have 1,300 tokens


def test_tenants() -> None:
    assert {session.tenant for session in asks(0, 1).of_tenant("acme")} == {"acme"}


# Text


def test_a_block_is_512_tokens_that_any_vocabulary_has() -> None:
    text = spell([3, 2**63 - 1], 1_000)
    assert count_tokens(text) == 1_000 and max(unpack(text)) < 256
    assert text == spell([3, 2**63 - 1, 5], 1_536)[: len(text)]
    assert list(unpack(text)[:8]) == [3, 0, 0, 0, 0, 0, 0, 0] and unpack(text)[512] == 255


block_ids = st.integers(0, 2**63 - 1)


@given(st.lists(block_ids, max_size=4), st.lists(block_ids, max_size=4), st.sampled_from([16, 512]))
def test_text_is_shared_as_far_as_blocks_are(one: list[int], other: list[int], block_tokens: int) -> None:
    shared = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    hashes, others = (list(chain_hashes(spell(ids, len(ids) * BLOCK_TOKENS), block_tokens, "")) for ids in (one, other))
    equal = sum(a == b for a, b in zip(hashes, others, strict=False))
    assert equal == shared * BLOCK_TOKENS // block_tokens


def test_invented_blocks_are_nobody_elses() -> None:
    one, other = BlockSupply("one"), BlockSupply("other")
    taken = [*one.take(513), *one.take(1), *other.take(1_024), *range(100)]
    assert len(set(taken)) == len(taken) == 105
    assert list(BlockSupply("one").take(1_025)) == taken[:3]
    assert [blocks_for(tokens) for tokens in (0, 1, 512, 513)] == [0, 1, 1, 2]


def test_a_prompt_is_all_that_was_said_and_answered_before() -> None:
    conversation = Conversation()
    first = conversation.say(Turn(600, [1, 2], 3))
    conversation.hear(pack([900, 901, 902]))
    second = conversation.say(Turn(10, [4], 3))
    assert first == spell([1, 2], 600)
    assert second == first + pack([900, 901, 902]) + spell([4], 10)


# Playing

Log = list[tuple[float, str, int]]
ONE_TOKEN = pack([1])


def player(log: Log, takes_s: float = 1.0, answers: Callable[[Session], bytes | None] = lambda _: ONE_TOKEN) -> Ask:
    """Answers after `takes_s`, and writes down (time, session, length of the prompt)."""

    async def ask(session: Session, turn: Turn, prompt: bytes) -> bytes | None:
        log.append((clock.now(), session.id, count_tokens(prompt)))
        await asyncio.sleep(takes_s)
        return answers(session)

    return ask


def chats() -> Iterator[Session]:
    turns = (Turn(10, [1], 1), Turn(20, [2], 1, after_s=5.0), Turn(30, [3], 1, after_s=0.5))
    yield Session("a", 2.0, turns)
    yield Session("b", 2.5, (Turn(7, [4], 1),))


def test_a_turn_comes_its_pause_after_the_answer_to_the_one_before() -> None:
    for takes_s in (1.0, 100.0):
        log: Log = []
        run_virtual(play(Workload(chats), player(log, takes_s)))
        at_s = [2.0, 2.0 + takes_s + 5, 2.0 + 2 * takes_s + 5.5]
        assert log == [(2.0, "a", 10), (2.5, "b", 7), (at_s[1], "a", 31), (at_s[2], "a", 62)]


def test_play_begins_when_it_is_called_and_returns_with_the_last_answer() -> None:
    async def story() -> None:
        await asyncio.sleep(100)
        await play(asks(0.1, 0.2, 0.30000000000000004), player(log))
        assert clock.now() == log[-1][0] + 1.0

    log: Log = []
    run_virtual(story())
    assert [at_s for at_s, _, _ in log] == [100 + 0.1, 100 + 0.2, 100 + 0.30000000000000004]


def test_a_session_without_an_answer_ends() -> None:
    log: Log = []
    run_virtual(play(Workload(chats), player(log, answers=lambda session: None if session.id == "a" else ONE_TOKEN)))
    assert [name for _, name, _ in log] == ["a", "b"]


def test_what_ask_raises_ends_everything() -> None:
    def fail(session: Session) -> None:
        raise RuntimeError(session.id)

    with pytest.raises(ExceptionGroup, match="unhandled errors") as raised:
        run_virtual(play(endless(), player([], answers=fail)))
    assert raised.group_contains(RuntimeError, match="e0")


def test_what_is_played_is_read_only_as_time_comes() -> None:
    drawn: list[float] = []

    def sessions() -> Iterator[Session]:
        for session in endless():
            drawn.append(clock.now())
            yield session

    async def story() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10.5):
                await play(Workload(sessions), player([]))

    run_virtual(story())
    assert drawn == [0.0, *(float(n) for n in range(11))]
