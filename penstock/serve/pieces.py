r"""Where a text may be cut so that its tokens are those of its pieces, one after the other. Used by `encoder`.

A tokenizer works in steps, and a cut is safe where no step looks across it. There are two kinds:

1. Before an added token (`<|im_start|>`). The library looks for these first, from left to right, the longest wins; what
   lies between them is normalized, searched for the rest of them, split and encoded on its own. So the cut must find
   the same tokens. Those of the second search are left alone where there is a normalizer. Tokens that take the spaces
   around them along, or must stand alone as words, look at their neighbours: with any such token there are no cuts.
   What is done to the first word of a text alone (Metaspace with `prepend_scheme` first) is done in its first piece
   alone, as the others begin with an added token.
2. In a long stretch of text, between an ASCII letter and a space. This needs a pre-tokenizer of byte-level BPE that is
   known to split there: in none of the regular expressions below can a match hold a letter followed by a space, so one
   ends there, and none looks behind itself. They look ahead only at the end of spaces, and before the cut there are
   none. NFC composes neither of the two with the other. No added token may hold a letter followed by a space.

Nothing is cut where chance decides (dropout).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.serve.tokenizer_steps import Step, steps_of

if TYPE_CHECKING:
    import tokenizers

PIECE_CHARS = 128  # in a piece, if not in the last one
SEARCH_CHARS = 1 << 16  # searched at a time, a fraction of a millisecond
STRETCH_CHARS = 1024  # from a cut to the next one before a space, if not a little more

_BEFORE_SPACE = re.compile(r"[A-Za-z](?= )")

_LOCAL = ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "Whitespace", "WhitespaceSplit")  # pre-tokenizers
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]")
_CASED_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}*{_CASED[1]}+%s|[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}+{_CASED[1]}*%s|"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = frozenset(
    [
        # GPT-4, Llama 3, GLM 4; Qwen 2 and 3; Qwen 3.5
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
        rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        # GPT-4o and gpt-oss; Mistral since Nemo
        _CASED_WORD % (f"{_CONTRACTION}?", f"{_CONTRACTION}?")
        + rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
        _CASED_WORD % ("", "") + rf"\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
        # DeepSeek V3 and R1: three, one after the other
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
        rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    ]
)


@dataclass(frozen=True, slots=True)
class Words:
    """What to look for, the longest first."""

    pattern: re.Pattern[str]
    longest: int


@dataclass(frozen=True, slots=True)
class Cutter:
    """The cuts that are safe for one tokenizer, by its added tokens."""

    first: Words | None  # those that are looked for before anything else
    second: Words | None  # those that are looked for between them
    is_split_at_spaces: bool

    def cut(self, text: str) -> list[str]:
        """Pieces that make up the text. Texts that begin alike are cut alike, except perhaps for the last piece."""
        ends = [*_apart(self._marks(text)), len(text)]
        if self.is_split_at_spaces:
            ends = list(_with_spaces(text, ends))
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False) if start < end]

    def _marks(self, text: str) -> Iterator[int]:
        """Where added tokens start, in order; also some that are nothing to cut at, such as spaces."""
        gap = 0
        for start, end in (*_spans(self.first, text, 0, len(text)), (len(text), len(text))):
            yield from (at for at, _ in _spans(self.second, text, gap, start))
            yield start
            gap = end


def _spans(words: Words | None, text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where the words stand in a part of the text. It is searched bit by bit: a search lets no other thread run."""
    while words is not None and start < end:
        edge = start + SEARCH_CHARS
        for found in words.pattern.finditer(text, start, min(end, edge + words.longest - 1)):
            if found.start() >= edge:
                break
            yield found.span()
            start = found.end()
        start = max(start, edge)


def _apart(marks: Iterable[int]) -> Iterator[int]:
    """Without those that would make a piece too short to be worth its own."""
    start = 0
    for mark in marks:
        if mark - start >= PIECE_CHARS:
            yield mark
            start = mark


def _with_spaces(text: str, ends: Sequence[int]) -> Iterator[int]:
    """`ends`, and cuts in stretches that are long."""
    start = 0
    for end in ends:
        searched = start + STRETCH_CHARS
        while searched < end:
            found = _BEFORE_SPACE.search(text, searched, min(end, searched + SEARCH_CHARS))
            if found is None:
                searched += SEARCH_CHARS - 1  # the space may be the next one
                continue
            start = found.end()
            searched = start + STRETCH_CHARS
            yield start
        yield end
        start = end


def cutter_of(tokenizer: tokenizers.Tokenizer) -> Cutter:
    """The safe cuts of a tokenizer, perhaps none."""
    added = [token for token in tokenizer.get_added_tokens_decoder().values() if token.content]
    looks_around = any(token.single_word or token.lstrip or token.rstrip for token in added)
    if looks_around or not _is_alike_everywhere(tokenizer):
        return Cutter(None, None, False)
    has_normalizer = bool(steps_of(tokenizer.normalizer))
    return Cutter(
        first=_any_of(token.content for token in added if not token.normalized),
        second=None if has_normalizer else _any_of(token.content for token in added if token.normalized),
        is_split_at_spaces=_splits_before_spaces(tokenizer)
        and not any(_BEFORE_SPACE.search(token.content) for token in added),
    )


def _any_of(contents: Iterable[str]) -> Words | None:
    longest_first = sorted(contents, key=len, reverse=True)
    if not longest_first:
        return None
    return Words(re.compile("|".join(map(re.escape, longest_first))), len(longest_first[0]))


def _is_alike_everywhere(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether a stretch between added tokens is encoded the same wherever it stands."""
    from tokenizers.models import BPE, Unigram

    model = tokenizer.model
    if not isinstance(model, BPE | Unigram) or (isinstance(model, BPE) and model.dropout):
        return False
    return all(step["type"] in _LOCAL for step in steps_of(tokenizer.pre_tokenizer))


def _splits_before_spaces(tokenizer: tokenizers.Tokenizer) -> bool:
    from tokenizers.models import BPE

    if not isinstance(tokenizer.model, BPE):
        return False
    if not all(step["type"] == "NFC" for step in steps_of(tokenizer.normalizer)):
        return False
    *splits, last = steps_of(tokenizer.pre_tokenizer) or [{}]
    if last.get("type") != "ByteLevel" or not all(map(_is_known, splits)):
        return False
    return bool(last["use_regex"]) or any(map(_splits_words, splits))


def _is_known(step: Step) -> bool:
    match step:
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return pattern in _PATTERNS
    return bool(step["type"] == "Digits")


def _splits_words(step: Step) -> bool:
    """Whether a known step splits words from spaces, beyond digits and scripts."""
    return step["type"] == "Split" and str(step["pattern"]["Regex"]).endswith(_SPACES)
