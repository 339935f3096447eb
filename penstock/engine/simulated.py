"""An engine without a model: it takes modelled time, writes real bytes, and its tokens depend on every one of them.

For each token it writes a 64-bit fingerprint into the block that the token belongs to, of each group. A fingerprint
mixes the one before it, as found in memory, with the token; a sampled token is a hash of all fingerprints of its
sequence that its groups keep, as found in memory. So a block that is missing, stale, foreign or swapped changes the
output, and `expected_tokens` says what it should have been. Writes are spread over the step as a real engine's are, not
done at its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.blocks import Keeps, KvLayout, Region
from penstock.engine.api import EngineInfo, Slice, Step
from penstock.errors import EngineFailed
from penstock.request import Sampling, Token

Words = NDArray[np.uint64]

_ODD = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Options:
    """How long a step takes: `step_s` + tokens computed and sequences decoded, each at its price. 0: no time at all.

    Tokens from 0 to `first_token - 1` are never produced, so a tokenizer's special tokens do not appear.
    """

    model: str = "simulated"  # a folder, or any name
    vocab_size: int = 0  # 0: as the folder's config.json says, else 32,000
    first_token: int = 100
    max_context_tokens: int = 8192
    block_tokens: int = 16
    keeps: tuple[Keeps, ...] = ("all",)
    step_s: float = 0.002
    prefill_token_s: float = 20e-6
    decode_sequence_s: float = 100e-6
    pieces: int = 2  # in how many parts a step's writes are spread over its time
    most_steps: int = 1  # that one call of `decode` computes; their tokens come together


class _Sizes(msgspec.Struct):
    """What matters here of a model's config.json."""

    vocab_size: int = 32_000


class SimulatedEngine:
    """Meets the Engine port. Of sampling only the seed matters, whether the temperature is 0, and `min_tokens`."""

    def __init__(self, options: Options) -> None:
        self._options = options = _complete(options)
        self._regions: dict[tuple[str, int], Words] = {}
        self._weights = _weights(options.max_context_tokens)
        self._is_interrupted = False

    @property
    def info(self) -> EngineInfo:
        options = self._options
        return EngineInfo(
            name="simulated",
            model=options.model,
            layout=KvLayout(1, 1, 1, options.block_tokens, "uint64", packing="fingerprints", keeps=options.keeps),
            vocab_size=options.vocab_size,
            max_context_tokens=options.max_context_tokens,
            eos_token_ids=(),
            device="cpu",
            shares_memory=True,
            supports=("sampling",),
        )

    async def __aenter__(self) -> SimulatedEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._regions.clear()

    def attach(self, region: Region) -> None:
        if region.buffer is None:
            raise EngineFailed(f"the simulated engine computes in host memory; region of {region.owner} has none")
        words = np.frombuffer(region.buffer, dtype=np.uint64)
        self._regions[region.key] = words.reshape(region.blocks, 2, region.layout.block_tokens)

    def detach(self, key: tuple[str, int]) -> None:
        self._regions.pop(key, None)

    async def step(self, step: Step) -> list[Token | None]:
        memory = self._regions.get(step.region.key)
        if memory is None:
            raise EngineFailed(f"region of {step.region.owner} is not attached")
        options = self._options
        decodes = sum(1 for part in step.slices if len(part.tokens) == 1)
        duration_s = options.step_s + step.tokens * options.prefill_token_s + decodes * options.decode_sequence_s
        for piece in range(options.pieces):
            for part in step.slices:
                for group in range(len(options.keeps)):
                    _write(memory, part, group, piece, options)
            await self.pass_time(duration_s / options.pieces)
        return [self._sample(memory, part) if part.sampling else None for part in step.slices]

    async def decode(self, step: Step, steps: int) -> list[list[Token]]:
        """Step after step, as `step` computes them."""
        made: list[list[Token]] = [[] for _ in step.slices]
        try:
            for _ in range(min(steps, self._options.most_steps)):
                for tokens, token in zip(made, await self.step(step), strict=True):
                    tokens.append(_sampled(token))
                if self._is_interrupted:
                    break
                step = Step(
                    step.region, [_next(part, tokens[-1]) for part, tokens in zip(step.slices, made, strict=True)]
                )
        finally:
            self._is_interrupted = False
        return made

    def interrupt(self) -> None:
        self._is_interrupted = True

    async def pass_time(self, seconds: float) -> None:
        """A part of a step's time goes by. Simulations put faults here."""
        await asyncio.sleep(seconds)

    def _sample(self, memory: Words, part: Slice) -> Token:
        length = part.start + len(part.tokens)
        tables = np.asarray(part.blocks).reshape(-1, len(self._options.keeps))
        digest = 0
        for group, keeps in enumerate(self._options.keeps):
            first = _first(keeps, length)
            column = first // memory.shape[2]
            start = first - column * memory.shape[2]
            fingerprints = memory[tables[column:, group], 0].reshape(-1)[start : start + length - first]
            digest += int(np.dot(fingerprints, self._weights[first:length]))
        return _token(digest, length, part.sampling, length - part.past.prompt_tokens, self._options)


def _next(part: Slice, token: Token) -> Slice:
    """The same sequence, one decode step later."""
    return replace(part, tokens=[token.id], start=part.start + 1)


def _sampled(token: Token | None) -> Token:
    if token is None:
        raise EngineFailed("a decode step was asked for of a sequence that samples nothing")
    return token


def expected_tokens(prompt: Sequence[int], sampling: Sampling, options: Options) -> list[int]:
    """What an undisturbed engine produces after `prompt`: the reference for tests."""
    options = _complete(options)
    tokens = list(prompt)
    weights = _weights(options.max_context_tokens)
    chains = [_Chain(group, keeps) for group, keeps in enumerate(options.keeps)]
    for each in chains:
        for token in tokens:
            each.add(token, weights)
    output: list[int] = []
    while len(output) < sampling.max_tokens and len(tokens) < options.max_context_tokens:
        token = _token(sum(each.digest for each in chains), len(tokens), sampling, len(output), options).id
        output.append(token)
        tokens.append(token)
        if len(tokens) < options.max_context_tokens:
            for each in chains:
                each.add(token, weights)
    return output


class _Chain:
    """The fingerprints of a sequence in one group, and what they add to the hash of the last of them."""

    def __init__(self, group: int, keeps: Keeps) -> None:
        self.digest = 0
        self._group = group
        self._keeps = keeps
        self._terms: list[int] = []  # the weighed fingerprints
        self._last = 0

    def add(self, token: int, weights: Words) -> None:
        self._last = _fingerprint(self._last, token, self._group)
        self._terms.append(self._last * int(weights[len(self._terms)]))
        self.digest += self._terms[-1]
        if (first := _first(self._keeps, len(self._terms))) > 0:
            self.digest -= self._terms[first - 1]


def _complete(options: Options) -> Options:
    """With the vocabulary of the model folder, so that its tokenizer can spell every token."""
    if options.vocab_size:
        return options
    config = Path(options.model) / "config.json"
    if not config.is_file():
        return replace(options, vocab_size=_Sizes().vocab_size)
    return replace(options, vocab_size=msgspec.json.decode(config.read_bytes(), type=_Sizes).vocab_size)


def _weights(length: int) -> Words:
    """Odd numbers, all different: a sum weighed by them notices an exchange."""
    return (np.arange(length, dtype=np.uint64) * np.uint64(2) + np.uint64(1)) * np.uint64(_ODD)


def mix(x: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): 64 bits in, 64 well-mixed bits out."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _fingerprint(before: int, token: int, group: int) -> int:
    return mix((before * _ODD + token + 1 + (group << 32)) & _MASK)


def _first(keeps: Keeps, length: int) -> int:
    """Of the first `length` tokens, the first that the last of them reads."""
    return 0 if keeps == "all" else max(0, length - 1 - keeps)


def _write(memory: Words, part: Slice, group: int, piece: int, options: Options) -> None:
    """Writes the `piece`-th run of this slice's fingerprints into one group's blocks, and the tokens beside them."""
    width, size, count = len(options.keeps), options.block_tokens, len(part.tokens)
    first, end = (count * edge // options.pieces for edge in (piece, piece + 1))
    for position, token in enumerate(part.tokens[first:end], part.start + first):
        before = 0
        if position:
            index, offset = divmod(position - 1, size)
            before = int(memory[part.blocks[index * width + group], 0, offset])
        index, offset = divmod(position, size)
        block = part.blocks[index * width + group]
        memory[block, 0, offset] = _fingerprint(before, token, group)
        memory[block, 1, offset] = token


def _token(digest: int, position: int, sampling: Sampling | None, outputs: int, options: Options) -> Token:
    """`outputs` tokens of the sequence are output."""
    salt = 0
    if sampling is not None and sampling.temperature > 0:
        salt = mix(sampling.seed & _MASK) ^ mix(sampling.choice + 1)
    drawn = mix((digest + position) & _MASK ^ salt)
    token = options.first_token + drawn % (options.vocab_size - options.first_token)
    if sampling is not None and outputs < sampling.min_tokens and token in sampling.stop_token_ids:
        token = _other(token, sampling.stop_token_ids, options)
    return Token(token)


def _other(token: int, banned: Sequence[int], options: Options) -> int:
    """The next one after `token` that is not banned; itself if all are."""
    later = chain(range(token + 1, options.vocab_size), range(options.first_token, token))
    return next((other for other in later if other not in banned), token)


ENGINE = SimulatedEngine
