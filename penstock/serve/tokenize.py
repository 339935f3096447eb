"""/tokenize and /detokenize, as vLLM has them: what a prompt is in tokens, and back. Used by `frontend`.

A conversation makes the tokens that /v1/chat/completions makes of it. `model` may be left out where one is served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from penstock.cluster import ModelCard
from penstock.errors import BadRequest, NoWorker
from penstock.serve.asks import ChatBody, RawMessages, conversation_of, read_body
from penstock.serve.text import MOST_TOKENS, Tokenizer
from penstock.serve.tools import parse_tools
from penstock.tokens import Tokens

NAMES_AT_A_TIME = 1 << 12  # looked up between two turns of the event loop

FindModel: TypeAlias = Callable[[str], tuple[ModelCard, Tokenizer]]  # raises UnknownModel, NoWorker
Tell: TypeAlias = Callable[[bytes, FindModel, Mapping[str, ModelCard]], Awaitable[bytes]]


class TokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Of POST /tokenize: a prompt or messages. Fields may be null for "not given"."""

    model: str | None = None
    prompt: str | None = None
    messages: RawMessages | None = None
    tools: list[object] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None
    add_special_tokens: bool | None = None  # by default around a prompt, and not around messages
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Of POST /detokenize."""

    tokens: list[Annotated[int, Meta(ge=0, lt=1 << 31)]]
    model: str | None = None


class Tokenized(msgspec.Struct, frozen=True):
    """The answer to /tokenize. `token_strs` are what the tokenizer's files call the tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct, frozen=True):
    """The answer to /detokenize."""

    prompt: str


async def tokenize(body: bytes, find_model: FindModel, served: Mapping[str, ModelCard]) -> bytes:
    """Raises BadRequest, PromptTooLong, UnknownModel or NoWorker."""
    fields = read_body(body, TokenizeBody)
    card, tokenizer = find_model(_named(fields.model, served))
    tokens = await _encode(fields, tokenizer)
    names = await _names(tokens, tokenizer) if fields.return_token_strs else None
    return msgspec.json.encode(Tokenized(len(tokens), card.max_context_tokens, list(tokens), names))


async def detokenize(body: bytes, find_model: FindModel, served: Mapping[str, ModelCard]) -> bytes:
    """Raises BadRequest, UnknownModel or NoWorker."""
    fields = read_body(body, DetokenizeBody)
    _, tokenizer = find_model(_named(fields.model, served))
    largest = max(fields.tokens, default=0)
    if largest >= tokenizer.vocab_size:
        raise BadRequest(f"tokens: {largest}; the model has {tokenizer.vocab_size} tokens, from 0 on", "tokens")
    return msgspec.json.encode(Detokenized(await tokenizer.decode(fields.tokens)))


def _named(model: str | None, served: Mapping[str, ModelCard]) -> str:
    """The model that is meant; where none is, the one that adapters adapt."""
    if model is not None:
        return model
    bases = [name for name, card in served.items() if not card.base]
    if len(bases) > 1:
        raise BadRequest(f"model: this server has several: {', '.join(bases)}; name one", "model")
    if not bases:
        raise NoWorker("no worker serves a model now; try again, or start one")
    return bases[0]


async def _encode(fields: TokenizeBody, tokenizer: Tokenizer) -> Tokens:
    if (fields.prompt is None) == (fields.messages is None):
        raise BadRequest("give a prompt or messages, not both", "prompt")
    if fields.prompt is not None:
        return await tokenizer.encode_text(fields.prompt, MOST_TOKENS, fields.add_special_tokens is not False)
    asked = ChatBody(
        model="",
        messages=fields.messages or [],
        tools=fields.tools,
        add_generation_prompt=fields.add_generation_prompt,
        continue_final_message=fields.continue_final_message,
        chat_template_kwargs=fields.chat_template_kwargs,
    )
    chat = conversation_of(asked, parse_tools(asked.tools, None, None))
    return await tokenizer.encode_chat(chat, MOST_TOKENS, bool(fields.add_special_tokens))


async def _names(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    names: list[str] = []
    for start in range(0, len(tokens), NAMES_AT_A_TIME):
        names += map(tokenizer.name, tokens[start : start + NAMES_AT_A_TIME])
        await asyncio.sleep(0)
    return names
