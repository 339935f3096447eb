"""What a step's time depends on, and how long one takes.

chunk   `tokens` new tokens of a prompt, after `context` that are cached:   tokens * (context + (tokens+1)/2) pairs
decode  `sequences` that add one token each, over a cache of `depth` tokens each
step    any number of chunks and decodes: their amounts add up

seconds =   step_s
          + token_s    * tokens beyond those that are free: weights are read once however few tokens use them
          + pair_s     * pairs of a new prompt token and one that it attends to
          + sequence_s * sequences that decode
          + read_s     * cached tokens that are read
          + experts_s  * share of the experts that some token of the step uses (mixtures only)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from penstock.cluster import StepPrices
from penstock.policy.latency.fit import MEMORY, Estimate, Line, OnlineFit, believe, fit_line

FREE_TOKENS = (0, 32, 64, 128, 192, 256, 384, 512, 1024, 2048)  # what a fit tries
_KINK = 1.05  # a kink must explain more than scatter does


class Work(msgspec.Struct, frozen=True):
    """What one step computes, as far as its time depends on it. Work done in one step adds up."""

    new_tokens: int = 0
    pairs: float = 0.0
    sequences: int = 0
    read_tokens: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.new_tokens + other.new_tokens,
            self.pairs + other.pairs,
            self.sequences + other.sequences,
            self.read_tokens + other.read_tokens,
        )


def chunk(tokens: int, context: float = 0) -> Work:
    """The next `tokens` tokens of a prompt of which `context` are cached."""
    return Work(tokens, tokens * (context + (tokens + 1) / 2), 0, context)


def decode(sequences: int, contexts: float) -> Work:
    """One token more for each of `sequences`, whose cached tokens are `contexts` in sum."""
    return Work(0, 0.0, sequences, contexts)


@dataclass(frozen=True, slots=True)
class Mix:
    """A typical step: a chunk of `tokens` after `context`, beside `sequences` that decode at a mean depth of `depth`.

    What roofline, tables and measurements are asked about.
    """

    tokens: int = 0
    context: int = 0
    sequences: int = 0
    depth: int = 0

    @property
    def work(self) -> Work:
        return chunk(self.tokens, self.context) + decode(self.sequences, self.sequences * self.depth)


class StepModel(msgspec.Struct, frozen=True):
    """Seconds of a step. `line` has the prices of the parts above, in this order.

    `expert_share` is the share of the experts that one token uses, 0 for a dense model, which has five parts only.
    """

    line: Line
    free_tokens: int = 0
    expert_share: float = 0.0

    @classmethod
    def of(cls, told: StepPrices) -> StepModel:
        """The model of a worker that reports these prices, taken at their word."""
        return cls(Line(told.prices, ()), told.free_tokens, told.expert_share)

    @property
    def prices(self) -> StepPrices:
        """What a worker reports of it."""
        return StepPrices(self.line.prices, self.free_tokens, self.expert_share)

    def seconds(self, work: Work) -> float:
        """Never falls when work is added."""
        return self.line.seconds(self.amounts(work))

    def estimate(self, work: Work) -> Estimate:
        return self.line.estimate(self.amounts(work))

    def prompt_s(self, tokens: int, context: int, chunk_tokens: int) -> float:
        """All `tokens` of a prompt after `context` cached ones, in steps of their own of at most `chunk_tokens`."""
        if tokens == 0:
            return 0.0
        full, rest = divmod(tokens - 1, chunk_tokens)
        halfway = context + chunk_tokens * (full - 1) / 2  # times are linear in the context, so the mean will do
        last = chunk(rest + 1, context + full * chunk_tokens)
        return full * self.seconds(chunk(chunk_tokens, halfway)) + self.seconds(last)

    def amounts(self, work: Work) -> tuple[float, ...]:
        tokens = work.new_tokens + work.sequences
        amounts = (1, max(0, tokens - self.free_tokens), work.pairs, work.sequences, work.read_tokens)
        return (*amounts, chosen_share(tokens, self.expert_share)) if self.expert_share else amounts


UNKNOWN = StepModel(believe((2e-3, 1e-4, 1e-8, 1e-4, 1e-7), doubt=3.0))  # a small model on one core, or anything else


class StepFit:
    """One worker's own step times. Owned by its stepper."""

    def __init__(self, prior: StepModel = UNKNOWN, memory: float = MEMORY) -> None:
        self._prior = prior
        self._fit = OnlineFit(prior.line, memory)

    def observe(self, work: Work, seconds: float) -> None:
        """Raises ValueError for a time that is negative or no number."""
        self._fit.observe(self._prior.amounts(work), seconds)

    @property
    def observations(self) -> int:
        """How many it has learned from."""
        return self._fit.observations

    @property
    def model(self) -> StepModel:
        """What is believed now: to predict with, and to report."""
        return StepModel(self._fit.line, self._prior.free_tokens, self._prior.expert_share)


def fit_steps(works: Sequence[Work], seconds: Sequence[float], expert_share: float = 0.0) -> StepModel:
    """The model that comes closest to what was measured, the number of free tokens included. Raises ValueError."""
    models = [_fit_with(StepModel(UNKNOWN.line, free, expert_share), works, seconds) for free in FREE_TOKENS]
    return min(models, key=lambda model: _misfit(model, works, seconds) * (_KINK if model.free_tokens else 1))


def prior_of(step_s: Callable[[Mix], float], doubt: float, expert_share: float = 0.0) -> StepModel:
    """A model that resembles `step_s` for steps of usual sizes.

    Any part may have been underrated by what would add a tenth to a step that has much of it.
    """
    mixes = typical_mixes()
    seconds = [step_s(mix) for mix in mixes]
    fitted = fit_steps([mix.work for mix in mixes], seconds, expert_share)
    columns = zip(*(fitted.amounts(mix.work) for mix in mixes), strict=True)
    slack = [0.1 * min(s / amount for s, amount in zip(seconds, column, strict=True) if amount) for column in columns]
    return StepModel(believe(fitted.line.prices, doubt, slack), fitted.free_tokens, expert_share)


def typical_mixes() -> list[Mix]:
    """Chunks alone, decodes alone, and both together, from small to large."""
    chunks = [Mix(tokens, context) for tokens in (64, 256, 512, 1024, 2048, 8192) for context in (0, 4096, 32_768)]
    decodes = [Mix(0, 0, batch, depth) for batch in (1, 8, 32, 64, 128, 256) for depth in (256, 2048, 16_384)]
    both = [Mix(tokens, 2048, batch, 2048) for tokens in (128, 512, 2048) for batch in (8, 64)]
    return [*chunks, *decodes, *both]


def saturating_tokens(model: StepModel, context: int, most: int, within: float = 0.05) -> int:
    """The smallest chunk of at most `most` tokens whose tokens per second come `within` the best that any reaches."""
    rates = [tokens / model.seconds(chunk(tokens, context)) for tokens in range(1, most + 1)]
    enough = (1 - within) * max(rates)
    return next(tokens for tokens, rate in enumerate(rates, 1) if rate >= enough)


def chosen_share(tokens: int, expert_share: float) -> float:
    """The share of the experts that some of `tokens` uses, if each uses `expert_share` of them at random."""
    return float(1 - (1 - expert_share) ** tokens)


def _fit_with(form: StepModel, works: Sequence[Work], seconds: Sequence[float]) -> StepModel:
    line = fit_line([form.amounts(work) for work in works], seconds)
    return StepModel(line, form.free_tokens, form.expert_share)


def _misfit(model: StepModel, works: Sequence[Work], seconds: Sequence[float]) -> float:
    """The mean absolute logarithm of predicted by measured."""
    return sum(abs(math.log(model.seconds(work) / taken)) for work, taken in zip(works, seconds, strict=True))
