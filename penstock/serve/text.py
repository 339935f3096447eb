"""Text into tokens and back, for one model: what the frontend knows of its tokenizer and chat template.

messages -> `chat_template` -> text -> `encoder` -> tokens -> engine -> tokens -> `detokenizer` -> text
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.errors import BadRequest, UnreadableModel
from penstock.serve.chat_template import Chat, ChatTemplate, load_json, load_template
from penstock.serve.detokenizer import Detokenizer, Output, Pieces, keep, spelling_of
from penstock.serve.encoder import Codec, Encoder, Offload, fast_codec, plain_codec
from penstock.serve.parsers.choice import PLAIN, Formats, pick
from penstock.serve.pieces import cutter_of
from penstock.serve.stop_strings import StopFinder
from penstock.serve.tokenizer_steps import Step, steps_of
from penstock.tokens import Tokens

if TYPE_CHECKING:
    import tokenizers


INLINE_TOKENS = 1 << 12  # more are decoded in a thread; these take under a millisecond
INLINE_MESSAGES = 256  # and documents; conversations with more are rendered in a thread
MOST_TOKENS = 1 << 20  # of one text that may be longer than a prompt


class Tokenizer:
    """The tokenizer and chat template of one model, shared by all requests."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        template: ChatTemplate | None,
        model: str,
        codec: Codec | None = None,
        offload: Offload | None = None,
        formats: Formats = PLAIN,
    ) -> None:
        """`model` is its name in errors; `codec` makes the same tokens, perhaps sooner; long work goes to `offload`.

        `formats` says how answers are read. Raises UnsupportedModel if its output cannot be streamed.
        """
        self.formats = formats
        self._tokenizer = tokenizer
        self._template = template
        self._model = model
        self._codec = codec or plain_codec(tokenizer)
        self._encoder = Encoder(self._codec, cutter_of(tokenizer), offload)
        self._offload = offload
        self._before, self._after = _tokens_around(tokenizer)
        self._spelling = spelling_of(tokenizer, model)
        self._special = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._texts: dict[tuple[str, ...] | None, Pieces] = {}  # by the special tokens that are text

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    async def encode_text(self, text: str, at_most: int, add_special_tokens: bool = True) -> Tokens:
        """Tokens of a text; those that the model wants around every text (a `<s>` at the start, say) if not told else.

        Raises PromptTooLong for some texts over `at_most` tokens, before they cost more than one that long:
        the caller still checks how many came back. The result is the caller's.
        """
        tokens = await self._encoder.encode(text, at_most)
        return self._before + tokens + self._after if add_special_tokens else tokens

    async def encode_chat(self, chat: Chat, at_most: int, add_special_tokens: bool = False) -> Tokens:
        """Tokens of a conversation; its template writes special ones. Raises like `encode_text`, and BadRequest."""
        if self._template is None:
            raise BadRequest(
                f"model {self._model!r} has no chat template; use /v1/completions, or put a chat_template.jinja "
                "into its folder",
                "messages",
            )
        return await self.encode_text(await self._render(self._template, chat), at_most, add_special_tokens)

    async def _render(self, template: ChatTemplate, chat: Chat) -> str:
        if self._offload is None or len(chat.messages) + len(chat.documents) <= INLINE_MESSAGES:
            return template.render(chat)
        return await self._offload(lambda: template.render(chat))

    def encode_text_nowait(self, text: str, add_special_tokens: bool = True) -> Tokens:
        """For short texts: encodes on the loop, and remembers nothing."""
        (tokens,) = self._codec.encode([text])
        return self._before + tokens + self._after if add_special_tokens else tokens

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones written out."""
        if self._offload is None or len(tokens) <= INLINE_TOKENS:
            return self.decode_nowait(tokens)
        return await self._offload(lambda: self.decode_nowait(tokens))

    def decode_nowait(self, tokens: Sequence[int]) -> str:
        """For few tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def name(self, token: int) -> str:
        """What the tokenizer's files call a token; empty for ids that it does not know."""
        return self._tokenizer.id_to_token(token) or ""

    def spell(self, token: int) -> bytes:
        """The bytes of one token, special tokens included; empty for ids that the tokenizer does not know."""
        piece = self._tokenizer.id_to_token(token)
        return b"" if piece is None else self._spelling.spell(piece)

    def output(
        self,
        stops: StopFinder | None = None,
        is_continuation: bool = False,
        min_tokens: int = 0,
        shown: tuple[str, ...] | None = (),
    ) -> Output:
        """Where one answer's tokens become text. A continuation keeps the space before its first word.

        Stop strings are looked for after `min_tokens` tokens. Of special tokens those in `shown` are text;
        None: all of them.
        """
        start = keep if is_continuation else self._spelling.start
        return Output(Detokenizer(self._pieces(shown), start), stops, min_tokens)

    def _pieces(self, shown: tuple[str, ...] | None) -> Pieces:
        """What each token adds to a text in which these special tokens are shown."""
        if shown not in self._texts:
            hidden = {i for i, name in self._special.items() if shown is not None and name not in shown}
            self._texts[shown] = Pieces(lambda token: b"" if token in hidden else self.spell(token))
        return self._texts[shown]


def load_tokenizer(
    folder: Path,
    model: str,
    offload: Offload | None = None,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> Tokenizer:
    """Reads tokenizer.json, tokenizer_config.json and the chat template of a Hugging Face model folder.

    `tool_parser` and `reasoning_parser` name how answers are read; None: as the model's kind and template suggest.
    Encodes with fastokens where that is installed and equal, and long texts through `offload` where there is one.
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
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UnreadableModel(f"{path} is no tokenizer that this release can read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    template = load_template(folder)
    formats = pick(_model_type(folder), "" if template is None else template.source, tool_parser, reasoning_parser)
    return Tokenizer(tokenizer, template, model, fast_codec(tokenizer), offload, formats)


def _model_type(folder: Path) -> str:
    return str(load_json(folder / "config.json").get("model_type", ""))


def _tokens_around(tokenizer: tokenizers.Tokenizer) -> tuple[Tokens, Tokens]:
    """The special tokens before and after every text, by its post-processor."""
    before: Tokens = array("I")
    after: Tokens = array("I")
    for step in steps_of(tokenizer.post_processor):
        inner, outer = _put_around(step)
        before, after = inner + before, after + outer
    return before, after


def _put_around(step: Step) -> tuple[Tokens, Tokens]:
    match step:
        case {"type": "TemplateProcessing", "single": single, "special_tokens": special}:
            at = next(index for index, part in enumerate(single) if "Sequence" in part)
            names = [[part["SpecialToken"]["id"] for part in parts] for parts in (single[:at], single[at + 1 :])]
            before, after = ([token for name in part for token in special[name]["ids"]] for part in names)
            return array("I", before), array("I", after)
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [_, before], "sep": [_, after]}:
            return array("I", [before]), array("I", [after])
    return array("I"), array("I")
