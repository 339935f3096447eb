"""Tokens of an answer into text, as they come: bytes of tokens, whole characters, stop strings. Used by `text`.

tokens -> bytes -> characters -> before a stop string
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.errors import UnsupportedModel
from penstock.serve.stop_strings import StopFinder
from penstock.serve.tokenizer_steps import steps_of

if TYPE_CHECKING:
    import tokenizers


class Output:
    """The text of one answer. Once `stopped_by` a stop string, later tokens do not count."""

    __slots__ = ("_detokenizer", "_min_tokens", "_stops", "stopped_by")

    def __init__(self, detokenizer: Detokenizer, stops: StopFinder | None, min_tokens: int) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._min_tokens = min_tokens
        self.stopped_by = ""

    def push(self, token: int) -> str:
        """What this token lets us show; often its own text, sometimes nothing yet, or more."""
        text = self._detokenizer.push(token)
        if self._stops is None:
            return text
        if self._min_tokens > 0:
            self._min_tokens -= 1
            return text
        text = self._stops.push(text)
        self.stopped_by = self._stops.found
        return text

    def finish(self) -> str:
        """What is left to show after the last token."""
        if self._stops is None:
            return self._detokenizer.finish()
        text = self._stops.push(self._detokenizer.finish())
        self.stopped_by = self._stops.found
        return text + self._stops.finish()


class Detokenizer:
    """Tokens of one answer into text, as they come.

    All together are what decoding all tokens at once gives, special tokens as `pieces` have them. Bytes are held back
    until their character is complete; what cannot become one is U+FFFD. One difference: if a run of SentencePiece
    byte tokens is not UTF-8 the library gives U+FFFD for all of it; here its valid characters are out already.
    """

    __slots__ = ("_held", "_pieces", "_start")

    def __init__(self, pieces: Mapping[int, bytes], start: Start) -> None:
        self._pieces = pieces
        self._start: Start | None = start
        self._held = b""

    def push(self, token: int) -> str:
        """The text that is certain now."""
        piece = self._pieces[token]
        if self._start is not None:
            piece, is_over = self._start(piece)
            if is_over:
                self._start = None
        data = self._held + piece
        text, used = utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def finish(self) -> str:
        """The rest: an incomplete character."""
        text, _ = utf_8_decode(self._held, "replace", True)
        self._held = b""
        return text


# How tokens spell bytes.

Start = Callable[[bytes], tuple[bytes, bool]]  # what becomes of a text's first pieces; is the start over?


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a family of tokenizers writes bytes into the names of its tokens."""

    spell: Callable[[str], bytes]
    start: Start


class Pieces(dict[int, bytes]):
    """What each token adds to the text; filled as tokens are met, since 256k of them take a while."""

    def __init__(self, spell: Callable[[int], bytes]) -> None:
        super().__init__()
        self._spell = spell

    def __missing__(self, token: int) -> bytes:
        piece = self[token] = self._spell(token)
        return piece


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 stands for itself, the other bytes for the characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _spell_byte_level(piece: str) -> bytes:
    try:
        return bytes([_BYTE_OF[char] for char in piece])
    except KeyError:  # an added token stands for itself
        return piece.encode()


def _spell_words(piece: str) -> bytes:
    return piece.replace("▁", " ").encode()


def _spell_words_or_bytes(piece: str) -> bytes:
    """SentencePiece writes a byte that no word covers as `<0x0A>`."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:  # looks like a byte and is a word
            pass
    return _spell_words(piece)


def keep(piece: bytes) -> tuple[bytes, bool]:
    return piece, True


def _drop_one_space(piece: bytes) -> tuple[bytes, bool]:
    return piece.removeprefix(b" "), piece != b""


def _drop_spaces(piece: bytes) -> tuple[bytes, bool]:
    return piece.replace(b" ", b""), piece != b""


def spelling_of(codec: tokenizers.Tokenizer, model: str) -> Spelling:
    """Raises UnsupportedModel for decoders whose text depends on more than the bytes of each token."""
    steps = steps_of(codec.decoder)
    match steps:
        case [{"type": "ByteLevel"}]:
            return Spelling(_spell_byte_level, keep)
        case [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            *strip,
        ] if strip in ([], [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]):
            return Spelling(_spell_words_or_bytes, _drop_one_space if strip else keep)
        case [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}]:
            return Spelling(_spell_words, keep if scheme == "never" else _drop_spaces)
    kinds = " + ".join(str(step["type"]) for step in steps) or "nothing"
    raise UnsupportedModel(
        f"the tokenizer of {model!r} decodes by {kinds}; penstock can stream byte-level and SentencePiece tokenizers"
    )
