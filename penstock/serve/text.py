"""Text into tokens and back: tokenizer, chat template, incremental detokenizer, stop strings. Used by `frontend`.

messages -> template -> text -> tokens -> engine -> tokens -> bytes -> text -> before a stop string
"""

from __future__ import annotations

import json
from codecs import utf_8_decode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.clock import wall_s
from penstock.errors import BadRequest, PromptTooLong, SetupError, UnreadableModel, UnsupportedModel

if TYPE_CHECKING:
    import tokenizers
    from jinja2 import Environment, nodes
    from jinja2.parser import Parser

Message = Mapping[str, str]  # "role", "content" and perhaps "name"

LONG_CHARS_PER_TOKEN = 4  # a text with more for each token it may have is first measured in pieces
PIECE_CHARS = 1 << 14
CUT_TOKENS = 16  # by how much cutting a text in two can change its number of tokens, generously


class Tokenizer:
    """The tokenizer and chat template of one model. Immutable; shared by all requests."""

    def __init__(self, codec: tokenizers.Tokenizer, template: ChatTemplate | None, model: str) -> None:
        """`model` is its name in errors. Raises UnsupportedModel if its output cannot be streamed."""
        self._codec = codec
        self._template = template
        self._model = model
        self._dialect = _dialect_of(codec, model)
        special = {i for i, token in codec.get_added_tokens_decoder().items() if token.special}
        self._texts = _Pieces(lambda token: b"" if token in special else self.spell(token))

    @property
    def vocab_size(self) -> int:
        return self._codec.get_vocab_size(with_added_tokens=True)

    def encode_text(self, text: str, at_most: int, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text, special ones around it included (a `<s>` at the start, say).

        Raises PromptTooLong for some texts over `at_most` tokens, before they cost more than one that long:
        the caller still checks how many came back. Blocks the loop, about 1 us for each token.
        """
        self._refuse_long(text, at_most)
        return self._encode(text, add_special_tokens)

    def encode_chat(self, messages: Sequence[Message], at_most: int) -> list[int]:
        """Tokens of a conversation up to where the assistant speaks. Raises like `encode_text`, and BadRequest."""
        if self._template is None:
            raise BadRequest(
                f"model {self._model!r} has no chat template; use /v1/completions, or put a chat_template.jinja "
                "into its folder",
                "messages",
            )
        text = self._template.render(messages)
        self._refuse_long(text, at_most)
        return self._encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones written out."""
        return self._codec.decode(list(tokens), skip_special_tokens=False)

    def spell(self, token: int) -> bytes:
        """The bytes of one token, special tokens included; empty for ids that the tokenizer does not know."""
        piece = self._codec.id_to_token(token)
        return b"" if piece is None else self._dialect.spell(piece)

    def output(self, stops: StopFinder | None = None, is_continuation: bool = False, min_tokens: int = 0) -> Output:
        """Where one answer's tokens become text. A continuation keeps the space before its first word.

        Stop strings are looked for after `min_tokens` tokens.
        """
        start = _keep if is_continuation else self._dialect.start
        return Output(Detokenizer(self._texts, start), stops, min_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """A batch of one, because only batches can leave out offsets into the text: a third of the time."""
        return self._codec.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def _refuse_long(self, text: str, at_most: int) -> None:
        """Counts the tokens of a long text piece by piece, and gives up once they are certainly too many."""
        if len(text) <= LONG_CHARS_PER_TOKEN * at_most:
            return
        tokens = 0
        for start in range(0, len(text), PIECE_CHARS):
            piece = self._encode(text[start : start + PIECE_CHARS], add_special_tokens=False)
            tokens += len(piece) - CUT_TOKENS
            if tokens > at_most:
                raise PromptTooLong(
                    f"the prompt of {len(text)} characters has more than {at_most} tokens, the most that "
                    f"model {self._model!r} takes here"
                )


def load_tokenizer(folder: Path, model: str) -> Tokenizer:
    """Reads tokenizer.json, tokenizer_config.json and the chat template of a Hugging Face model folder.

    Raises UnreadableModel or UnsupportedModel.
    """
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnreadableModel(
            f"{folder} has no tokenizer.json; save one there with AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...)"
        )
    try:
        codec = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UnreadableModel(f"{path} is no tokenizer that this release can read: {error}") from error
    codec.no_truncation()
    codec.no_padding()
    return Tokenizer(codec, _load_template(folder), model)


# Tokens to bytes.

Start = Callable[[bytes], tuple[bytes, bool]]  # what becomes of a text's first pieces; is the start over?


@dataclass(frozen=True, slots=True)
class _Dialect:
    """How a family of tokenizers writes bytes into the names of its tokens."""

    spell: Callable[[str], bytes]
    start: Start


class _Pieces(dict[int, bytes]):
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


def _keep(piece: bytes) -> tuple[bytes, bool]:
    return piece, True


def _drop_one_space(piece: bytes) -> tuple[bytes, bool]:
    return piece.removeprefix(b" "), piece != b""


def _drop_spaces(piece: bytes) -> tuple[bytes, bool]:
    return piece.replace(b" ", b""), piece != b""


def _dialect_of(codec: tokenizers.Tokenizer, model: str) -> _Dialect:
    """Raises UnsupportedModel for decoders whose text depends on more than the bytes of each token."""
    steps = _decoder_steps(codec)
    match steps:
        case [{"type": "ByteLevel"}]:
            return _Dialect(_spell_byte_level, _keep)
        case [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            *strip,
        ] if strip in ([], [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]):
            return _Dialect(_spell_words_or_bytes, _drop_one_space if strip else _keep)
        case [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}]:
            return _Dialect(_spell_words, _keep if scheme == "never" else _drop_spaces)
    kinds = " + ".join(str(step["type"]) for step in steps) or "nothing"
    raise UnsupportedModel(
        f"the tokenizer of {model!r} decodes by {kinds}; penstock can stream byte-level and SentencePiece tokenizers"
    )


def _decoder_steps(codec: tokenizers.Tokenizer) -> list[dict[str, object]]:
    """The decoder as tokenizer.json writes it, sequences opened."""
    if codec.decoder is None:
        return []
    decoder = json.loads(codec.decoder.__getstate__())
    steps: list[dict[str, object]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps


class Detokenizer:
    """Tokens of one answer into text, as they come.

    All pieces together are what decoding all tokens at once gives, special tokens left out. Bytes are held back
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


class StopFinder:
    """Finds the first stop string in a growing text, and holds back what may become one."""

    __slots__ = ("_firsts", "_held", "_includes", "_longest", "_stops", "found")

    def __init__(self, stops: Sequence[str], includes: bool = False) -> None:
        """With `includes` the string that is found is part of the text."""
        self._stops = stops
        self._longest = max(len(stop) for stop in stops)
        self._firsts = {stop[0] for stop in stops}
        self._held = ""
        self._includes = includes
        self.found = ""

    def push(self, text: str) -> str:
        """The text that is certainly outside of any stop string; once one is found, the text before it, then none."""
        if self.found:
            return ""
        text = self._held + text
        hits = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            at, self.found = min(hits, key=lambda hit: hit[0])
            self._held = ""
            return text[: at + len(self.found) * self._includes]
        cut = self._first_suspect(text)
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """What was held back and did not become a stop string."""
        text, self._held = self._held, ""
        return text

    def _first_suspect(self, text: str) -> int:
        """Where the earliest ending of `text` starts that is the beginning of a stop string."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._firsts and any(stop.startswith(text[at:]) for stop in self._stops):
                return at
        return len(text)


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


# Chat templates.


class ChatTemplate:
    """A model's own Jinja template, run in a sandbox with what transformers gives it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises SetupError if the template does not parse."""
        from jinja2 import TemplateError

        self._special_tokens = special_tokens
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise SetupError(f"the chat template does not parse: {error}; fix chat_template.jinja") from error

    def render(self, messages: Sequence[Message]) -> str:
        """The text up to the assistant's answer. Raises BadRequest where the template refuses the messages."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
        except Exception as error:  # templates are programs: what they raise on odd messages is anything
            raise BadRequest(f"the chat template refuses these messages: {error}", "messages") from error


def _environment() -> Environment:
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it changes nothing."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Without HTML's escapes, unlike Jinja's own."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.fromtimestamp(wall_s()).strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


def _load_template(folder: Path) -> ChatTemplate | None:
    config = _load_config(folder / "special_tokens_map.json") | _load_config(folder / "tokenizer_config.json")
    source = _template_source(folder, config.get("chat_template"))
    return None if source is None else ChatTemplate(source, _special_tokens(config))


def _load_config(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnreadableModel(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UnreadableModel(f"{path} is not a JSON object")
    return config


def _template_source(folder: Path, configured: object) -> str | None:
    """The file of its own wins; in a list of named templates, the one named default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if isinstance(configured, list):
        named = {entry["name"]: entry["template"] for entry in configured}
        return named.get("default")
    return configured if isinstance(configured, str) else None


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """`bos_token` and the like; each is written as a string, or as an object with its `content`."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
