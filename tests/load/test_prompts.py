"""Prompts: as many tokens as were asked for, equal where blocks are equal, and whole conversations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import penstock
from penstock.errors import SetupError
from penstock.load.prompts import (
    COMMON,
    OPENING,
    ChatTalk,
    IdsTalk,
    Prefix,
    Prompts,
    TextTalk,
    Words,
    ids,
    words_of_server,
    words_of_tokenizer,
)
from penstock.workloads.workload import BLOCK_TOKENS, Turn
from tests.support import run

DEMO = Path(penstock.__file__).parent / "models" / "demo"
WORDS = Words(tuple(f" {word}" for word in COMMON), (1,) * len(COMMON), 5)
LONG = Words((" one", " two", " three"), (2, 3, 5), 5)
BLOCKS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4)


def cost(words: Words, text: str) -> int:
    return sum(words.costs[words.words.index(f" {word}")] for word in text.split())


@given(BLOCKS, st.integers(0, BLOCK_TOKENS - 1))
def test_text_has_the_tokens_that_were_asked_for(blocks: list[int], short: int) -> None:
    tokens = len(blocks) * BLOCK_TOKENS - short
    assert cost(WORDS, WORDS.text(blocks, tokens)) == tokens
    assert tokens - min(LONG.costs) < cost(LONG, LONG.text(blocks, tokens)) <= tokens


@given(BLOCKS, st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_equal_blocks_begin_with_equal_text(shared: list[int], one: int, other: int) -> None:
    tokens = (len(shared) + 1) * BLOCK_TOKENS
    first, second = (WORDS.text([*shared, end], tokens) for end in (one, other))
    head = WORDS.text(shared, tokens - BLOCK_TOKENS)
    assert first.startswith(head) and second.startswith(head)
    assert (first == second) == (one == other)
    assert ids([*shared, one], tokens)[:-BLOCK_TOKENS] == ids(shared, tokens - BLOCK_TOKENS)


def test_token_ids_are_in_every_vocabulary() -> None:
    made = ids(range(4), 2000)
    assert len(made) == 2000 and min(made) >= 256 and max(made) < 1000
    assert len(set(made)) > 600


def test_a_server_is_asked_twice_where_every_word_is_a_token() -> None:
    asked: list[str] = []

    async def count(text: str) -> int:
        asked.append(text)
        return 10 + len(text.split())

    words = run(words_of_server(count))
    assert (len(asked), len(words.words), set(words.costs)) == (2, len(COMMON), {1})
    assert words.overhead_tokens == 10 + len(OPENING.split())


def test_else_for_every_word_and_those_that_vary_are_left_out() -> None:
    async def count(text: str) -> int:
        odd = 1 if text.count(" time") == 8 else 0
        return len(text) + odd  # a token is a character

    words = run(words_of_server(count))
    assert " time" not in words.words
    assert all(cost == len(word) for word, cost in zip(words.words, words.costs, strict=True))


def test_words_of_no_known_size_are_refused() -> None:
    async def count(text: str) -> int:
        return 7

    with pytest.raises(SetupError, match="no word has a fixed number of tokens"):
        run(words_of_server(count))


def test_a_tokenizer_tells_its_words() -> None:
    async def count(text: str) -> int:
        return 30

    words = run(words_of_tokenizer(DEMO, count))
    assert len(words.words) > 50 and set(words.costs) == {1} and words.overhead_tokens == 30


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    async def count(text: str) -> int:
        raise AssertionError

    with pytest.raises(SetupError, match=r"there is no .*tokenizer.json"):
        run(words_of_tokenizer(tmp_path, count))
    with pytest.raises(SetupError, match=r"tokenizer.json cannot be read"):
        (tmp_path / "tokenizer.json").write_text("{")
        run(words_of_tokenizer(tmp_path, count))


FIRST, LATER = Turn(100, range(7, 8), 5), Turn(20, range(8, 9), 5)


def test_a_chat_is_a_growing_list_of_messages() -> None:
    talk = ChatTalk(WORDS, range(1, 2), 50)
    said = json.loads(json.dumps(talk.say(FIRST)))["messages"]
    assert [message["role"] for message in said] == ["system", "user"]
    assert cost(WORDS, said[0]["content"].removeprefix(OPENING)) == 50
    assert cost(WORDS, said[1]["content"].removeprefix(OPENING)) == 95  # 5 are the server's own
    talk.hear("an answer", 5)
    more = json.loads(json.dumps(talk.say(LATER)))["messages"]
    assert more[:2] == said
    assert more[2] == {"role": "assistant", "content": "an answer"}
    assert cost(WORDS, more[3]["content"].removeprefix(OPENING)) == 20


def test_a_text_goes_on_with_its_answer() -> None:
    talk = TextTalk(WORDS, (), 0)
    said = str(talk.say(FIRST)["prompt"])
    talk.hear(" an answer", 2)
    more = str(talk.say(LATER)["prompt"])
    assert more.startswith(said + " an answer")
    assert cost(WORDS, more.removeprefix(said + " an answer")) == 20


def test_token_ids_go_on_with_as_many_as_were_answered() -> None:
    talk = IdsTalk(range(1, 2), 50)
    said = talk.say(FIRST)["prompt"]
    talk.hear("an answer", 5)
    more = talk.say(LATER)["prompt"]
    assert isinstance(said, list) and isinstance(more, list)
    assert (len(said), len(more)) == (150, 175)
    assert more[:150] == said


def test_sessions_take_prefixes_in_turn() -> None:
    def prefix(session: int, salt: str) -> list[int]:
        said = Prompts("completions", None, Prefix(300, 2), salt).talk(session).say(FIRST)["prompt"]
        assert isinstance(said, list)
        return said[:300]

    assert prefix(0, "a") == prefix(2, "a") != prefix(1, "a") == prefix(3, "a")
    assert prefix(0, "a") != prefix(0, "b")
