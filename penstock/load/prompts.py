"""Prompts of so many tokens, and what a request says: the body for one endpoint, turn after turn.

Text is a function of a workload's block ids, so prompts share what their blocks share. It is made of words whose
tokens are known, from a tokenizer or by asking the server, or, for /v1/completions, of token ids.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import numpy as np
from tokenizers import Tokenizer

from penstock.errors import SetupError
from penstock.workloads.workload import BLOCK_TOKENS, BlockSupply, Turn

Endpoint = Literal["chat", "completions"]
CountTokens = Callable[[str], Awaitable[int]]  # of a prompt with this text, as the server counts

FIRST_ID, IDS = 256, 744  # token ids of made-up prompts: below 1,000, which every vocabulary has
KNOWN_WORDS = 4_000  # of a tokenizer's vocabulary that are taken
CACHED_BLOCKS = 4_096  # whose text is kept at hand
REPEATS = 8  # of a word whose tokens are asked for
OPENING = "Read this:"  # of every text, so that all words have a space before them
_COMMON = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work number night point home water room mother area money story fact
month lot right study book eye job word business issue side kind head house service friend father power hour game line
end member law car city name team minute idea body back parent face level office door
"""
COMMON = tuple(_COMMON.split())


@dataclass(frozen=True, eq=False)  # so that it is quick to hash
class Words:
    """`words` with a space before each, and how many tokens each is; a prompt has `overhead_tokens` beside them."""

    words: tuple[str, ...]
    costs: tuple[int, ...]
    overhead_tokens: int

    def text(self, blocks: Sequence[int], tokens: int) -> str:
        """Of that many tokens, as nearly as the words allow. The same blocks begin with the same text."""
        return _join(self, tuple(blocks), tokens)


def _join(words: Words, blocks: tuple[int, ...], tokens: int) -> str:
    parts, rest = [], tokens
    for block in blocks:
        text, cost = _block(words, block, min(rest, BLOCK_TOKENS))
        parts.append(text)
        rest -= cost
    shortest = words.costs.index(min(words.costs))
    parts.append(words.words[shortest] * (max(0, rest) // words.costs[shortest]))
    return "".join(parts)


@lru_cache(maxsize=CACHED_BLOCKS)
def _block(words: Words, block: int, tokens: int) -> tuple[str, int]:
    """Words of a block that together are at most so many tokens, and how many they are."""
    chosen = np.random.default_rng(block).integers(len(words.words), size=BLOCK_TOKENS).tolist()
    parts, cost = [], 0
    for place in chosen:
        if cost + words.costs[place] <= tokens:
            parts.append(words.words[place])
            cost += words.costs[place]
    return "".join(parts), cost


@lru_cache(maxsize=CACHED_BLOCKS)
def _block_ids(block: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(block).integers(FIRST_ID, FIRST_ID + IDS, size=BLOCK_TOKENS).tolist()
    return drawn


def ids(blocks: Sequence[int], tokens: int) -> list[int]:
    """Token ids, the same for the same blocks."""
    return [token for block in blocks for token in _block_ids(block)][:tokens]


# Finding out how many tokens words are


async def words_of_server(count: CountTokens) -> Words:
    """Asks it: twice where every word is a token, else for each. Raises SetupError if no words can be counted."""
    empty = await count(OPENING)
    together = await count(OPENING + "".join(f" {word}" for word in COMMON))
    if together - empty == len(COMMON):
        return Words(tuple(f" {word}" for word in COMMON), (1,) * len(COMMON), empty)
    costs = {}
    for word in COMMON:
        tokens, rest = divmod(await count(OPENING + f" {word}" * REPEATS) - empty, REPEATS)
        if tokens and not rest:
            costs[f" {word}"] = tokens
    return _known(costs, empty, "the server's tokenizer")


async def words_of_tokenizer(folder: Path, count: CountTokens) -> Words:
    """Words that are one token for the tokenizer, and what the server adds. Raises SetupError."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise SetupError(f"--tokenizer: there is no {file}: name the folder of the model that the server serves")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # of no other class
        raise SetupError(f"--tokenizer: {file} cannot be read: {error}") from error

    def tokens_of(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    opening = tokens_of(OPENING)
    spelled = (tokenizer.decode([place]) for place in range(tokenizer.get_vocab_size()))
    whole = dict.fromkeys(" " + text.strip() for text in spelled if text.strip().isalpha() and text.isascii())
    costs = {word: 1 for word in whole if tokens_of(OPENING + word * REPEATS) == opening + REPEATS}
    costs = dict(list(costs.items())[:KNOWN_WORDS])
    return _known(costs, await count(OPENING), f"{file}")


def _known(costs: Mapping[str, int], overhead_tokens: int, whose: str) -> Words:
    if not costs:
        raise SetupError(f"no word has a fixed number of tokens for {whose}: use --endpoint completions")
    return Words(tuple(costs), tuple(costs.values()), overhead_tokens)


# Conversations


class Talk(Protocol):
    """What was said and answered so far in one session."""

    def say(self, turn: Turn) -> Mapping[str, object]:
        """The fields of the next request that hold its prompt."""
        ...

    def hear(self, answer: str, tokens: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Prefix:
    """What prompts begin with before their own text: one of `count` texts, which sessions take in turn."""

    tokens: int = 0
    count: int = 1

    def blocks(self, salt: str, session: int) -> range:
        """Of the session with that number; other salts, other texts."""
        return BlockSupply(f"prefix {session % self.count} {salt}").take(self.tokens)


class ChatTalk:
    """Messages for /v1/chat/completions. A shared prefix is the system's message."""

    def __init__(self, words: Words, prefix: Sequence[int], prefix_tokens: int) -> None:
        self._words = words
        self._spare_tokens = words.overhead_tokens
        system = {"role": "system", "content": OPENING + words.text(prefix, prefix_tokens)}
        self._messages = [system] if prefix_tokens else []

    def say(self, turn: Turn) -> Mapping[str, object]:
        tokens = max(1, turn.tokens - self._spare_tokens)
        self._spare_tokens = 0
        self._messages.append({"role": "user", "content": OPENING + self._words.text(turn.blocks, tokens)})
        return {"messages": self._messages}

    def hear(self, answer: str, tokens: int) -> None:
        self._messages.append({"role": "assistant", "content": answer})


class TextTalk:
    """One growing text for /v1/completions."""

    def __init__(self, words: Words, prefix: Sequence[int], prefix_tokens: int) -> None:
        self._words = words
        self._spare_tokens = words.overhead_tokens
        self._text = OPENING + words.text(prefix, prefix_tokens)

    def say(self, turn: Turn) -> Mapping[str, object]:
        tokens = max(1, turn.tokens - self._spare_tokens)
        self._spare_tokens = 0
        self._text += self._words.text(turn.blocks, tokens)
        return {"prompt": self._text}

    def hear(self, answer: str, tokens: int) -> None:
        self._text += answer


class IdsTalk:
    """Token ids for /v1/completions. Answers come as text, so as many made-up tokens stand for them."""

    def __init__(self, prefix: Sequence[int], prefix_tokens: int) -> None:
        self._ids = ids(prefix, prefix_tokens)

    def say(self, turn: Turn) -> Mapping[str, object]:
        self._ids = self._ids + ids(turn.blocks, turn.tokens)
        return {"prompt": self._ids}

    def hear(self, answer: str, tokens: int) -> None:
        self._ids = self._ids + [FIRST_ID] * tokens


@dataclass(frozen=True, slots=True)
class Prompts:
    """How sessions talk to an endpoint. Without `words`, in token ids. Other salts, other prefixes."""

    endpoint: Endpoint
    words: Words | None
    prefix: Prefix
    salt: str

    def talk(self, session: int) -> Talk:
        """Of the session with that number."""
        blocks, tokens = self.prefix.blocks(self.salt, session), self.prefix.tokens
        if self.words is None:
            return IdsTalk(blocks, tokens)
        return (ChatTalk if self.endpoint == "chat" else TextTalk)(self.words, blocks, tokens)


def path(endpoint: Endpoint) -> str:
    return "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"


def counting(endpoint: Endpoint, text: str) -> Mapping[str, object]:
    """The fields of a request whose prompt is to be counted."""
    return {"messages": [{"role": "user", "content": text}]} if endpoint == "chat" else {"prompt": text}


def encode(fields: Mapping[str, object]) -> bytes:
    """A request's body."""
    return msgspec.json.encode(fields)
