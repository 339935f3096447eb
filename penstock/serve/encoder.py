"""Texts into tokens, piece by piece and remembered; the same as the tokenizer makes of the whole. Used by `text`.

    text -> pieces -> those seen before are looked up -> the others are encoded, in a thread if they are long -> tokens

A conversation comes back one turn longer each time, and its system prompt comes with every conversation: only what is
new costs an encoding.
"""

from __future__ import annotations

import logging
from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from random import Random
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

from penstock.errors import PromptTooLong
from penstock.serve.pieces import Cutter
from penstock.tokens import TOKEN_BYTES, Tokens, unpack

if TYPE_CHECKING:
    import tokenizers

T = TypeVar("T")

log = logging.getLogger(__name__)

GROUP_CHARS = 1 << 14  # are encoded at a time
LONG_CHARS_PER_TOKEN = 4  # a piece with more for each token it may have is first measured in parts
CUT_TOKENS = 16  # by how much cutting a text in two anywhere can change its number of tokens, generously
INLINE_CUT_CHARS = 1 << 18  # texts with more are cut in a thread; these take a few ms
CACHE_BYTES = 64 << 20
ENTRY_BYTES = 300  # of a remembered piece beside its text and its tokens

Encode: TypeAlias = Callable[[Sequence[str]], list[Tokens]]


@dataclass(frozen=True, slots=True)
class Codec:
    """Makes tokens of texts, without special ones around them, in any thread."""

    encode: Encode
    inline_chars: int  # that take no more than 2 ms


class Offload(Protocol):
    """Runs a function elsewhere than on the event loop."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]: ...


class Encoder:
    """Encodes for one model. Owns what it remembers: at most `cache_bytes`, the pieces that were used last."""

    def __init__(
        self, codec: Codec, cutter: Cutter, offload: Offload | None = None, cache_bytes: int = CACHE_BYTES
    ) -> None:
        """Without `offload` everything is encoded on the loop, as it must be in virtual time."""
        self._codec = codec
        self._cutter = cutter
        self._offload = offload
        self._memory = _Memory(cache_bytes)

    async def encode(self, text: str, at_most: int) -> Tokens:
        """Raises PromptTooLong for some texts over `at_most` tokens, before they cost more than one that long."""
        pieces = await self._cut(text)
        known = {piece: tokens for piece in pieces if (tokens := self._memory.find(piece)) is not None}
        missing = [piece for piece in dict.fromkeys(pieces) if piece not in known]
        if missing:
            known |= zip(missing, await self._encode_new(missing, at_most), strict=True)
        whole: Tokens = array("I")
        for piece in pieces:
            whole.extend(known[piece])
        return whole

    async def _cut(self, text: str) -> list[str]:
        if self._offload is None or len(text) <= INLINE_CUT_CHARS:
            return self._cutter.cut(text)
        return await self._offload(lambda: self._cutter.cut(text))

    async def _encode_new(self, pieces: Sequence[str], at_most: int) -> list[Tokens]:
        encode = self._codec.encode
        if self._offload is None or sum(map(len, pieces)) <= self._codec.inline_chars:
            encoded = encode_within(encode, pieces, at_most)
        else:
            encoded = await self._offload(lambda: encode_within(encode, pieces, at_most))
        for piece, tokens in zip(pieces, encoded, strict=True):
            self._memory.keep(piece, tokens)
        return encoded


class _Memory:
    """Tokens of pieces of text; the least recently used ones are forgotten."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._tokens: OrderedDict[str, Tokens] = OrderedDict()

    def find(self, piece: str) -> Tokens | None:
        tokens = self._tokens.get(piece)
        if tokens is not None:
            self._tokens.move_to_end(piece)
        return tokens

    def keep(self, piece: str, tokens: Tokens) -> None:
        if piece in self._tokens:  # encoded twice at the same time
            return
        self._tokens[piece] = tokens
        self._bytes += _size(piece, tokens)
        while self._bytes > self._limit_bytes:
            self._bytes -= _size(*self._tokens.popitem(last=False))


def _size(piece: str, tokens: Tokens) -> int:
    """At most 4 bytes for a character."""
    return ENTRY_BYTES + 4 * len(piece) + TOKEN_BYTES * len(tokens)


# Encoding.


def encode_within(encode: Encode, pieces: Sequence[str], at_most: int) -> list[Tokens]:
    """Tokens of each piece. Raises PromptTooLong soon after they are certainly more than `at_most` together."""
    encoded: list[Tokens] = []
    left = at_most
    for group in _groups(pieces):
        for piece in group:
            _refuse_long(encode, piece, left)
        encoded += (tokens := encode(group))
        left -= sum(map(len, tokens))
        if left < 0:
            raise _too_long(at_most)
    return encoded


def _groups(pieces: Sequence[str]) -> list[list[str]]:
    """Neighbours together, up to GROUP_CHARS unless one alone has more."""
    groups: list[list[str]] = [[]]
    chars = 0
    for piece in pieces:
        chars += len(piece)
        if chars > GROUP_CHARS and groups[-1]:
            groups.append([])
            chars = len(piece)
        groups[-1].append(piece)
    return groups


def _refuse_long(encode: Encode, text: str, at_most: int) -> None:
    """Counts the tokens of a long text part by part, and gives up once they are certainly too many."""
    if len(text) <= max(GROUP_CHARS, LONG_CHARS_PER_TOKEN * at_most):
        return
    left = at_most
    for start in range(0, len(text), GROUP_CHARS):
        left -= len(encode([text[start : start + GROUP_CHARS]])[0]) - CUT_TOKENS
        if left < 0:
            raise _too_long(at_most)


def _too_long(at_most: int) -> PromptTooLong:
    return PromptTooLong(f"the prompt has more than {at_most} tokens, the most that it may have here")


# Codecs.


def plain_codec(tokenizer: tokenizers.Tokenizer) -> Codec:
    """The tokenizers library's."""

    def encode(texts: Sequence[str]) -> list[Tokens]:
        """As a batch, because only batches can leave out offsets into the text: a third of the time."""
        return [array("I", one.ids) for one in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    return Codec(encode, inline_chars=1 << 13)


def fast_codec(tokenizer: tokenizers.Tokenizer) -> Codec | None:
    """The fastokens library's, ten times as quick; None where it is not installed or makes other tokens of anything.

    It is compared on texts made up from this tokenizer's own words, special tokens and what tends to differ.
    """
    try:
        fastokens = import_module("fastokens")
    except ImportError:
        return None
    try:
        quick = fastokens.Tokenizer.from_json_str(tokenizer.to_str())
    except ValueError as error:
        log.info("fastokens does not read this tokenizer, so tokenizers encodes: %s", error)
        return None

    def encode(texts: Sequence[str]) -> list[Tokens]:
        return [unpack(quick.encode_batch_flat([text])[0]) for text in texts]

    if (text := find_difference(plain_codec(tokenizer).encode, encode, samples(tokenizer))) is not None:
        log.info("fastokens makes other tokens of %r, so tokenizers encodes", text)
        return None
    return Codec(encode, inline_chars=1 << 16)


SAMPLES = 400
SAMPLE_PARTS = 24
ODD_PARTS = (
    *(" ", "  ", "\n", "\r\n\r\n", "\t", "\u00a0", "\u3000", "\u200b", "\u2028", "\x00", "\x85", "\ufeff", "▁", "Ġ"),
    *("'s", "'LL", "I'm", "1", "12345", "½", "Ⅷ", "²", "!", "...", "_", "/*", "</", "<|", "|>", "<0x0A>", "<unk>"),
    *(
        "water",
        " Water",
        "WATER",
        "é",
        "e\u0301",
        "\u0301",
        "Å",
        "ﬁ",
        "İ",
        "ß",
        "ǅ",
        "東京",
        "タ",
        "は",
        "한국어",
        "\u1100\u1161",
    ),
    *("שלום", "مرحبا", "क्षि", "\u0e01\u0e33", "😀", "👍🏽", "\u200d", "\U0001d518", "\U0010ffff"),
)


def samples(tokenizer: tokenizers.Tokenizer) -> list[str]:
    """Texts on which libraries tend to differ; always the same for one tokenizer."""
    rng = Random(0)
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()][:100]
    size = tokenizer.get_vocab_size()
    words = [tokenizer.id_to_token(token) or "" for token in rng.sample(range(size), min(500, size))]
    words = [word.replace("Ġ", " ").replace("▁", " ") for word in words]
    texts = []
    for _ in range(SAMPLES):
        parts = (rng.choice(rng.choice((ODD_PARTS, ODD_PARTS, words, added or words))) for _ in range(SAMPLE_PARTS))
        texts.append("".join(part[: rng.choice((99, 99, 99, 3))] for part in parts))
    return [*ODD_PARTS, *added, *texts]


def find_difference(one: Encode, other: Encode, texts: Sequence[str]) -> str | None:
    """The first text of which they make different tokens."""
    pairs = zip(texts, one(texts), other(texts), strict=True)
    return next((text for text, mine, yours in pairs if mine != yours), None)
