"""From what a client asks to requests for workers: prompts as tokens, what was not said, how much may be generated.

Everything that can be refused without asking a worker is refused here. Used by `frontend`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import msgspec

from penstock.cluster import ModelCard
from penstock.errors import BadRequest, PromptTooLong, Unsupported
from penstock.request import Request, Sampling
from penstock.serve.asks import Ask, Prompt, output_budget
from penstock.serve.text import MOST_TOKENS, Tokenizer
from penstock.tokens import pack

MOST_TOLD = 1 << 21  # ids and log probabilities of prompts, by one answer
END_TOKENS = 32  # of a prompt, that parsers see


@dataclass(frozen=True, slots=True)
class Told:
    """A prompt, as its answer knows it."""

    echoed: str = ""  # what the answer begins with
    end: str = ""  # of a chat's: templates may open what the answer closes


def check_needs(ask: Ask, card: ModelCard) -> None:
    """Raises Unsupported for what the model's engine lacks."""
    for feature, name in ask.needs:
        if feature not in card.supports:
            raise Unsupported(f"the engine that serves {ask.model!r} has no {feature}; leave {name} out", name)


async def encode_prompts(ask: Ask, tokenizer: Tokenizer, context_tokens: int) -> list[Sequence[int]]:
    """Raises PromptTooLong, and BadRequest for prompts without tokens and for tokens that the model does not have.

    `context_tokens` is what the model takes; what is to be cut down to its last tokens may be longer.
    """
    if ask.takes_last_tokens is not None:
        context_tokens = MOST_TOKENS
    name = _field_of_prompt(ask)
    try:
        if ask.chat is not None:
            prompts: list[Sequence[int]] = [await tokenizer.encode_chat(ask.chat, context_tokens)]
        else:
            prompts = [await _encode(prompt, ask, tokenizer, context_tokens) for prompt in ask.prompts]
    except PromptTooLong as error:
        raise PromptTooLong(str(error), name) from None
    if not all(prompts):
        raise BadRequest(f"{name}: it makes no tokens", name)
    return [prompt if ask.takes_last_tokens is None else prompt[-ask.takes_last_tokens :] for prompt in prompts]


async def _encode(prompt: Prompt, ask: Ask, tokenizer: Tokenizer, context_tokens: int) -> Sequence[int]:
    if isinstance(prompt, str):
        return await tokenizer.encode_text(prompt, context_tokens, ask.adds_special)
    _check_tokens(prompt, "prompt", tokenizer)
    return prompt


async def told_of(ask: Ask, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer) -> list[Told]:
    """What an answer must know of its prompts, one by one."""
    if ask.chat is not None and tokenizer.formats.reasoning is not None:
        return [Told(end=tokenizer.decode_nowait(prompt[-END_TOKENS:])) for prompt in prompts]
    if not ask.echoes:
        return [Told()] * len(prompts)
    return [
        Told(given if isinstance(given, str) and ask.takes_last_tokens is None else await tokenizer.decode(prompt))
        for given, prompt in zip(ask.prompts, prompts, strict=True)
    ]


def sampling_of(ask: Ask, tokenizer: Tokenizer, defaults: Mapping[str, object], rng: Random) -> Sampling:
    """How the tokens of every choice are to be chosen, but for their number. Raises BadRequest."""
    seed = rng.getrandbits(63) if ask.seed is None else ask.seed
    bad_words = [spelling for word in ask.bad_words for spelling in _spellings(word, tokenizer)]
    sampling = ask.sampling(defaults, max_tokens=1, seed=seed, bad_words=tuple(bad_words))
    _check_tokens(sampling.stop_token_ids, "stop_token_ids", tokenizer)
    _check_tokens([token for token, _ in sampling.logit_bias], "logit_bias", tokenizer)
    if ask.best_of > ask.n and sampling.logprobs is None:
        return msgspec.structs.replace(sampling, logprobs=0)  # the best is the likeliest
    return sampling


def requests_of(
    ask: Ask, prompts: Sequence[Sequence[int]], card: ModelCard, default_tokens: int | None, like: Request
) -> list[Request]:
    """One for each choice, prompt by prompt, otherwise like the one given. Raises PromptTooLong, BadRequest."""
    _refuse_much_told(ask, prompts, like.sampling)
    requests: list[Request] = []
    asked = ask.max_tokens if ask.max_tokens is None else max(1, ask.max_tokens)  # 0: the prompt alone is told
    for prompt in prompts:
        budget = output_budget(len(prompt), asked, default_tokens, card.max_context_tokens, _field_of_prompt(ask))
        if (least := like.sampling.min_tokens) > budget:
            raise BadRequest(f"min_tokens = {least} is over the {budget} tokens that may be generated", "min_tokens")
        packed = pack(prompt)
        sampling = msgspec.structs.replace(like.sampling, max_tokens=budget)
        for choice in range(ask.best_of):
            if choice:  # the first one's log probabilities of the prompt are everybody's
                sampling = msgspec.structs.replace(sampling, choice=choice, prompt_logprobs=None)
            id = f"{like.id}-{len(requests)}" if requests else like.id
            requests.append(msgspec.structs.replace(like, id=id, prompt=packed, sampling=sampling))
    return requests


def _refuse_much_told(ask: Ask, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    """Each choice of a plain completion tells of its prompt anew, a chat does so once."""
    scores = 0 if sampling.prompt_logprobs is None else sampling.prompt_logprobs + 1
    told = (scores + ask.shows_token_ids + ask.echoes) * ask.n * sum(map(len, prompts))
    if ask.chat is None and told > MOST_TOLD:
        raise BadRequest(
            f"n: so many choices would tell {told} values of their prompts; the most is {MOST_TOLD}. Ask for fewer, or "
            "leave echo, prompt_logprobs and return_token_ids out",
            "n",
        )


def _field_of_prompt(ask: Ask) -> str:
    return "prompt" if ask.chat is None else "messages"


def _spellings(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """A word at the start of a text and after a space, where it is as long, as vLLM understands `bad_words`."""
    alone = _word_tokens(word.lstrip(), tokenizer)
    spaced = _word_tokens(" " + word.lstrip(), tokenizer)
    return [alone, spaced] if spaced[:1] != alone[:1] and len(spaced) == len(alone) else [alone]


def _word_tokens(word: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    tokens = tuple(tokenizer.encode_text_nowait(word, add_special_tokens=False))
    if not tokens:
        raise BadRequest(f"bad_words: {word!r} makes no tokens", "bad_words")
    return tokens


def _check_tokens(tokens: Sequence[int], name: str, tokenizer: Tokenizer) -> None:
    largest = max(tokens, default=0)
    if largest >= tokenizer.vocab_size:
        raise BadRequest(f"{name}: token {largest}; the model has {tokenizer.vocab_size} tokens, from 0 on", name)
