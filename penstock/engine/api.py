"""The port of engines that penstock schedules: one call computes one step.

The worker decides what a step contains, which blocks it reads and writes and when it happens; an engine does the
arithmetic. It never sees requests, leases or peers. Engines with a scheduler of their own (vLLM, SGLang) will meet a
port at the level of whole sequences instead.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from penstock.blocks import BlockId, KvLayout, Region
from penstock.errors import PenstockError
from penstock.policy.latency.steps import UNKNOWN, StepModel
from penstock.request import Sampling, Token
from penstock.tokens import Tokens

# What an engine may lack; requests that need it are refused with a 400. "sampling" draws from the model's distribution
# or a part of it, "penalties" changes the distribution: penalties, biases and bad words. Every engine has seeds,
# min_tokens, stop_token_ids and ignore_eos. "guide" holds the output to a schema, an expression or a grammar.
FEATURES = ("logprobs", "sampling", "penalties", "prompt_logprobs", "guide")


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a worker must know of its engine."""

    name: str
    model: str
    layout: KvLayout
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    device: str  # "cpu", "cuda:0"
    shares_memory: bool  # KV lives in host memory that other processes can map
    supports: tuple[str, ...] = FEATURES
    step_prior: StepModel = UNKNOWN  # how long its steps should take, until the worker has seen some
    kv_room_bytes: int = 0  # what its device has left for KV once the model is loaded; 0: host memory, ask the host


@dataclass(frozen=True, slots=True)
class Past:
    """A sequence up to the token that is sampled next. `tokens` grows with the sequence: it is read during a step only.

    `sequence` names it for as long as this worker has it, so that an engine may keep the state of a grammar or counts
    of tokens from step to step. They can always be found again from the tokens alone.
    """

    sequence: str
    tokens: Tokens
    prompt_tokens: int  # the first so many are the prompt, the others output

    @property
    def output(self) -> Tokens:
        return self.tokens[self.prompt_tokens :]


NO_PAST = Past("", array("I"), 0)


@dataclass(frozen=True, slots=True)
class Slice:
    """What one sequence contributes to a step: `tokens`, the first of them at position `start`.

    `blocks` is its block table, long enough for `start + len(tokens)` tokens, with holes where no token from `start` on
    reads. Positions before `start` have been computed; the engine writes KV of the rest into the table's blocks, and no
    other byte of the region.
    With `sampling` the engine also samples the token that follows; `start + len(tokens)` is its position. What that may
    depend on besides the logits is in `past`. With `scores` it also tells how likely each prompt token was that follows
    one of `tokens`, beside so many of the likeliest in its place, see `ScoringEngine`.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[BlockId]
    sampling: Sampling | None = None
    past: Past = NO_PAST
    scores: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass over slices whose blocks all lie in one region."""

    region: Region
    slices: Sequence[Slice]
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", sum(len(s.tokens) for s in self.slices))


class SequencesFailed(Exception):
    """Some of a step's sequences cannot go on, whatever else is in their step; the step does not count for any.

    `errors` says why, by `Past.sequence`. Without these the step may be tried again.
    """

    def __init__(self, errors: Mapping[str, PenstockError]) -> None:
        super().__init__(", ".join(f"{sequence}: {error}" for sequence, error in errors.items()))
        self.errors = errors


class Engine(Protocol):
    """Used as `async with engine:`; entering loads the model. One step at a time."""

    @property
    def info(self) -> EngineInfo:
        """Known before entering, but for `kv_room_bytes`."""
        ...

    async def __aenter__(self) -> Engine: ...

    async def __aexit__(self, *_: object) -> None: ...

    def attach(self, region: Region) -> None:
        """Prepares to compute in `region`: the worker's own, or a peer's mapped in place. Idempotent by `key`."""
        ...

    def detach(self, key: tuple[str, int]) -> None:
        """Lets go of a region so that it can be unmapped. Unknown keys are ignored."""
        ...

    async def step(self, step: Step) -> list[Token | None]:
        """One token for each slice with `sampling`, else None, in order.

        Cancelling the await does not stop the computation: the caller shields it and waits, since the memory is
        being written until it returns. Raises EngineFailed, or SequencesFailed where it is for some of them alone.
        """
        ...


@runtime_checkable
class MultiStepEngine(Engine, Protocol):
    """An engine that can compute several decode steps in one call, while nothing else is to be done."""

    async def decode(self, step: Step, steps: int) -> list[list[Token]]:
        """The tokens of each slice after up to `steps` steps: equally many for all, at least one.

        Every slice has one token and `sampling`, and a block table that is long enough for `start + steps` tokens; what
        is sampled in one step is the input of the next. Like `step` it must be shielded from cancellation.
        """
        ...

    def interrupt(self) -> None:
        """Lets the `decode` that was called last, even if it has not begun, end with the step it is at.

        Called only between that call and its return.
        """
        ...


@dataclass(frozen=True, slots=True)
class Scored:
    """What a step told of one slice: the token sampled, if one was, and the prompt's tokens with log probabilities."""

    sampled: Token | None
    prompt: Sequence[Token] = ()


@runtime_checkable
class ScoringEngine(Engine, Protocol):
    """An engine that can tell log probabilities of the prompt: it supports "prompt_logprobs"."""

    async def score(self, step: Step) -> list[Scored]:
        """As `step`, and of each slice with `scores` the prompt's tokens at positions `start + 1` to its end + 1.

        Of a prompt that is computed in several slices, one after the other, each token but the first is told once.
        """
        ...
