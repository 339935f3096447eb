"""Drives an engine as a worker would: sequences with block tables, stepped in any mixture."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from random import Random

import torch

from penstock.blocks import BlockId, KvLayout, Region
from penstock.engine.api import Engine, Past, Slice, Step
from penstock.request import Sampling, Token
from penstock.tokens import Tokens
from tests.models import VOCABULARY

GREEDY = Sampling(max_tokens=1, temperature=0)
WHOLE = Sampling(max_tokens=1, temperature=0, logprobs=VOCABULARY)  # with the whole distribution


def poisoned_region(layout: KvLayout, blocks: int = 96) -> Region:
    """Every byte 255: in any floating dtype NaN."""
    return Region("worker", 1, layout, blocks, memoryview(bytearray(b"\xff") * (blocks * layout.block_bytes)))


def prompts(*lengths: int) -> list[list[int]]:
    random = Random(7)
    return [[random.randrange(4, VOCABULARY) for _ in range(length)] for length in lengths]


def generated(folder: object, prompt: list[int], tokens: int) -> list[int]:
    """What transformers' own generate() says, greedily, in float32, with the attention every model has."""
    return all_generated(folder, [prompt], tokens)[0]


def all_generated(folder: object, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """The same for each of `prompts`, one by one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()
        outputs.append(output[len(prompt) :])
    return outputs


@dataclass
class Running:
    """One sequence. `computed` tokens have their keys and values in `blocks`."""

    past: Past
    blocks: list[BlockId]
    sampling: Sampling
    computed: int = 0
    output: list[Token] = field(default_factory=list)

    @property
    def tokens(self) -> Tokens:
        return self.past.tokens

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.output]


class Driver:
    """Hands out a region's blocks in random order and steps sequences over them."""

    def __init__(self, engine: Engine, region: Region | None = None) -> None:
        self.region = region or poisoned_region(engine.info.layout)
        self._engine = engine
        self._free = [BlockId(block) for block in range(self.region.blocks)]
        self._names = count()
        Random(1).shuffle(self._free)
        engine.attach(self.region)

    def start(self, prompt: list[int], tokens: int, sampling: Sampling = GREEDY) -> Running:
        """A sequence with blocks for its prompt and `tokens` more."""
        wanted = self.region.layout.entries_for(len(prompt) + tokens)
        past = Past(f"s{next(self._names)}", array("I", prompt), len(prompt))
        return Running(past, [self._free.pop() for _ in range(wanted)], sampling)

    async def step(self, *work: tuple[Running, int]) -> None:
        """One step over so many tokens of each sequence; samples where they are the last."""
        slices = [
            Slice(
                tokens=one.tokens[one.computed : one.computed + tokens],
                start=one.computed,
                blocks=one.blocks,
                sampling=one.sampling if one.computed + tokens == len(one.tokens) else None,
                past=one.past,
            )
            for one, tokens in work
        ]
        sampled = await self._engine.step(Step(self.region, slices))
        for (one, tokens), token in zip(work, sampled, strict=True):
            one.computed += tokens
            if token is not None:
                one.tokens.append(token.id)
                one.output.append(token)

    async def peek(self, one: Running, blocks: list[BlockId]) -> Token:
        """The token that follows, read through another block table; nothing of the sequence changes."""
        last = Slice(one.tokens[-1:], len(one.tokens) - 1, blocks, one.sampling, one.past)
        (token,) = await self._engine.step(Step(self.region, [last]))
        assert token is not None
        return token

    def zero(self, block: BlockId) -> None:
        buffer, size = self.region.buffer, self.region.layout.block_bytes
        assert buffer is not None
        buffer[block * size : (block + 1) * size] = bytes(size)

    async def decode(self, running: Iterable[Running], tokens: int) -> None:
        """Steps all of them together until each has `tokens` of output."""
        while unfinished := [one for one in running if len(one.output) < tokens]:
            await self.step(*((one, 1) for one in unfinished))


def distance(ours: list[Token], theirs: list[Token]) -> float:
    """The largest difference between log probabilities of two outputs that were sampled with `WHOLE`."""
    pairs = [(dict(a.top), dict(b.top)) for a, b in zip(ours, theirs, strict=True)]
    return max(abs(a[token] - b[token]) for a, b in pairs for token in a)
