"""Prompts of requests for other people's servers, as tokens: to be looked up, and to be counted.

Tokens come from the model's own tokenizer where there is one; else from the server, by vLLM's /tokenize; else four
bytes of text stand for a token: nearly right as a count, and enough to send equal beginnings to the same place.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from penstock.errors import BadRequest, PenstockError
from penstock.serve.chat_template import Chat
from penstock.serve.text import Tokenizer
from penstock.serve.upstream import Upstream
from penstock.tokens import TOKEN_BYTES, pack

DEFAULT_OUTPUT_TOKENS = 256  # where a request does not say


ABSENT = msgspec.Raw()


class Wanted(msgspec.Struct, frozen=True):
    """What routing reads of a request's body; the rest is between the client and the server."""

    model: str = ""
    prompt: str | list[int | str | list[int]] | None = None
    messages: msgspec.Raw = ABSENT
    tools: msgspec.Raw = ABSENT
    chat_template_kwargs: msgspec.Raw = ABSENT
    input: msgspec.Raw = ABSENT  # of embeddings
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    cache_salt: str | None = None

    @property
    def output_tokens(self) -> int:
        return max(1, self.max_completion_tokens or self.max_tokens or DEFAULT_OUTPUT_TOKENS)


class _Message(msgspec.Struct, frozen=True):
    role: str
    content: str | list[dict[str, object]]


_read_wanted = msgspec.json.Decoder(Wanted).decode
_read_messages = msgspec.json.Decoder(list[_Message]).decode


class _Tokenized(msgspec.Struct, frozen=True):
    tokens: list[int]


_read_tokenized = msgspec.json.Decoder(_Tokenized).decode


def read_wanted(body: bytes) -> Wanted:
    """Raises BadRequest for what is no request at all; whether it is a good one, the server says."""
    try:
        return _read_wanted(body)
    except msgspec.MsgspecError as error:
        raise BadRequest(f"the body cannot be routed: {error}") from error


class Prompts:
    """Turns prompts into tokens. `tokenizer` is the model's, if the router has it."""

    def __init__(self, tokenizer: Tokenizer | None, upstream: Upstream) -> None:
        self._tokenizer = tokenizer
        self._upstream = upstream

    @property
    def tokenizes(self) -> bool:
        return self._tokenizer is not None

    async def tokens(self, wanted: Wanted, limit: int, url: str | None) -> bytes:
        """The prompt, packed; at least one token. `url` is a server that tokenizes for this model, if there is one.

        What nobody can tokenize, a prompt with sounds say, is taken as text: a guess costs a worse choice.
        """
        given = _first(wanted.prompt)
        try:
            found: Sequence[int] = given if isinstance(given, list) else await self._encode(wanted, given, limit)
            if not found and url is not None and (given or bytes(wanted.messages)):
                found = await self._ask(url, wanted, given)
            return pack(found) if found else _as_text(wanted, given)
        except (PenstockError, msgspec.MsgspecError, OverflowError):
            return _as_text(wanted, given)

    async def _encode(self, wanted: Wanted, given: str | None, limit: int) -> Sequence[int]:
        """Nothing if this is not for the router's tokenizer, or it has none. Raises PenstockError or MsgspecError."""
        if self._tokenizer is None:
            return []
        if given is not None:
            return await self._tokenizer.encode_text(given, limit)
        if not bytes(wanted.messages) or bytes(wanted.tools) or bytes(wanted.chat_template_kwargs):
            return []
        messages = _read_messages(wanted.messages)
        if not all(map(_is_text, messages)):
            return []
        chat = Chat([{"role": one.role, "content": _text_of(one)} for one in messages])
        return await self._tokenizer.encode_chat(chat, limit)

    async def _ask(self, url: str, wanted: Wanted, given: str | list[int] | None) -> list[int]:
        raw = {
            "messages": wanted.messages,
            "tools": wanted.tools,
            "chat_template_kwargs": wanted.chat_template_kwargs,
        }
        fields: dict[str, object] = {name: value for name, value in raw.items() if bytes(value)}
        if given is not None:
            fields["prompt"] = given
        body = msgspec.json.encode({"model": wanted.model, **fields})
        status, answer = await self._upstream.fetch(f"{url}/tokenize", body, {"content-type": "application/json"})
        return _read_tokenized(answer).tokens if status == 200 else []


def _first(prompt: str | Sequence[int | str | list[int]] | None) -> str | list[int] | None:
    """A request can carry several prompts; the first decides where all of them go."""
    if prompt is None or isinstance(prompt, str):
        return prompt
    if prompt and not isinstance(prompt[0], int):
        return prompt[0]
    return [token for token in prompt if isinstance(token, int)]


def _is_text(message: _Message) -> bool:
    return isinstance(message.content, str) or all(part.get("type") == "text" for part in message.content)


def _text_of(message: _Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(str(part.get("text", "")) for part in message.content)


def _as_text(wanted: Wanted, given: str | list[int] | None) -> bytes:
    text = b"".join(map(bytes, (wanted.tools, wanted.messages, wanted.input)))
    if isinstance(given, str):
        text = given.encode("utf-8", "replace")
    whole = len(text) - len(text) % TOKEN_BYTES
    return text[:whole] or bytes(TOKEN_BYTES)
