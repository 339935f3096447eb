"""Chooses tokens from logits, and tells their log probabilities. The order is vLLM's:

    the model's logits -> log probabilities, if asked for
        -> bans, biases and penalties, see embedded_penalties
        -> what a guide rules out, see embedded_guides
        -> greedy, or temperature -> min_p -> top_k -> top_p -> one draw

Rows do not see each other: the same logits, sampling, past and position give the same token alone or in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from penstock.engine.api import NO_PAST, Past, SequencesFailed
from penstock.engine.chance import uniform
from penstock.engine.embedded_guides import Guides
from penstock.engine.embedded_penalties import Penalties
from penstock.errors import EngineFailed
from penstock.request import Sampling, Token

_COLDEST = torch.finfo(torch.float32).tiny  # what is colder would be 0 in float32, and nothing could be drawn


@dataclass(frozen=True, slots=True)
class Draw:
    """One row of logits: how to choose from it, the position of the token that is chosen, and those before it."""

    sampling: Sampling
    position: int
    past: Past = NO_PAST


class Sampler:
    """Of one model. Used from one thread."""

    def __init__(self, eos_token_ids: Sequence[int] = (), guides: Guides | None = None) -> None:
        self._penalties = Penalties(eos_token_ids)
        self._guides = guides or Guides(None)

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> list[Token]:
        """One token for each row of `logits` [rows, vocabulary], of any floating dtype.

        Raises SequencesFailed for guides that cannot be followed, and see `check_finite`.
        """
        mask = self._guides.mask([(draw.sampling, draw.past) for draw in draws], logits)  # a GPU still computes
        logits = logits.float()
        greedy = _best(logits)
        best = logits.gather(-1, greedy[:, None])[:, 0]
        check_finite(best, [(draw.past.sequence, draw.position) for draw in draws])
        shaped = self._shape(logits, draws)
        if mask is not None:
            shaped = mask.apply(shaped, logits)
        if shaped is not logits:
            greedy = _best(shaped)
        return _tell(logits, _choose(shaped, greedy, draws), draws)

    def _shape(self, logits: Tensor, draws: Sequence[Draw]) -> Tensor:
        """With all that applies to greedy choices as well; `logits` itself where no row asks for any.

        A row that would be left without a token stays as the model has it.
        """
        rows = [row for row, draw in enumerate(draws) if self._penalties.are_due(draw.sampling, draw.past)]
        if not rows:
            return logits
        index = torch.tensor(rows, device=logits.device)
        changed = logits[index]
        self._penalties.apply(changed, [(draws[row].sampling, draws[row].past) for row in rows])
        empty = ~changed.amax(-1).isfinite()
        if empty.any():
            changed[empty] = logits[index[empty]]
        return logits.index_copy(0, index, changed)


def _best(logits: Tensor) -> Tensor:
    """The first token with each row's highest logit. A NaN counts as highest."""
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    return torch.from_numpy(logits.numpy().argmax(-1))  # torch's own takes ten times as long on the CPU


def check_finite(best: Tensor, places: Sequence[tuple[str, int]]) -> None:
    """Raises SequencesFailed unless the largest logit of each row is a number: for what is no distribution, since keys
    and values were damaged or a dtype overflowed. `places` are the rows' sequences, and positions in them.
    """
    if not best.isfinite().all():
        damaged = [place for place, top in zip(places, best.tolist(), strict=True) if not isfinite(top)]
        raise SequencesFailed(
            {
                name: EngineFailed(f"{name}: the logits for position {position} are not finite")
                for name, position in damaged
            }
        )


def _choose(logits: Tensor, greedy: Tensor, draws: Sequence[Draw]) -> list[int]:
    ids: list[int] = greedy.tolist()
    chance = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if chance:
        for row, drawn in zip(chance, _draw(logits[chance], [draws[row] for row in chance]), strict=True):
            ids[row] = drawn
    return ids


def _tell(logits: Tensor, ids: Sequence[int], draws: Sequence[Draw]) -> list[Token]:
    """The tokens `ids`, with log probabilities where they were asked for: the model's own, from its `logits`."""
    tokens = [Token(chosen) for chosen in ids]
    asked = [row for row, draw in enumerate(draws) if draw.sampling.logprobs is not None]
    if asked:
        tops = [draws[row].sampling.logprobs or 0 for row in asked]
        for row, token in zip(asked, with_logprobs(logits[asked], [ids[row] for row in asked], tops), strict=True):
            tokens[row] = token
    return tokens


def _draw(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Inverts each row's distribution function, with tokens in the order of their ids, at the row's uniform.

    By id and not by probability: rounding, which differs between shapes of batches, would swap near equals in a
    sorted order, whereas here it only shifts the boundaries between tokens.
    """
    samplings = [draw.sampling for draw in draws]
    temperatures = logits.new_tensor([s.temperature for s in samplings])[:, None].clamp_min(_COLDEST)
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperatures
    if any(s.min_p for s in samplings):  # of the likeliest, whose logit is 0 here
        scaled = scaled.masked_fill(scaled < logits.new_tensor([s.min_p for s in samplings]).log()[:, None], -torch.inf)
    narrowed = [row for row, s in enumerate(samplings) if s.top_k > 0 or s.top_p < 1]
    if narrowed:
        scaled[narrowed] = _narrow(scaled[narrowed], [samplings[row] for row in narrowed])
    cumulative = scaled.softmax(-1).cumsum(-1, dtype=torch.float64)
    uniforms = [uniform(s.seed, s.choice, draw.position) for s, draw in zip(samplings, draws, strict=True)]
    targets = cumulative[:, -1:] * cumulative.new_tensor(uniforms)[:, None]
    chosen: list[int] = torch.searchsorted(cumulative, targets, right=True)[:, 0].tolist()
    return chosen


def _narrow(scaled: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """-inf for all but the `top_k` likeliest tokens and, of their distribution, the fewest that hold `top_p`.

    Of equals the one with the smaller id counts as likelier.
    """
    vocabulary = scaled.shape[-1]
    top_k = torch.tensor([s.top_k or vocabulary for s in samplings], device=scaled.device)[:, None]
    top_p = scaled.new_tensor([s.top_p for s in samplings], dtype=torch.float64)[:, None]
    ordered, ids = scaled.sort(stable=True, dim=-1, descending=True)
    ordered = ordered.masked_fill(torch.arange(vocabulary, device=scaled.device) >= top_k, -torch.inf)
    probabilities = ordered.softmax(-1).double()
    likelier = probabilities.cumsum(-1) - probabilities
    ordered = ordered.masked_fill((likelier >= top_p) & (top_p < 1), -torch.inf)
    return torch.empty_like(scaled).scatter_(-1, ids, ordered)


def with_logprobs(logits: Tensor, ids: Sequence[int], tops: Sequence[int]) -> list[Token]:
    """The tokens `ids` with natural log probabilities of the model's own distribution, and the likeliest `tops`."""
    logprobs = logits.log_softmax(-1)
    own: list[float] = logprobs.gather(-1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(max(tops), logits.shape[-1]), dim=-1)
    likeliest = [
        tuple(zip(row_ids, row_logprobs, strict=True))
        for row_ids, row_logprobs in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    rows = zip(ids, own, likeliest, tops, strict=True)
    return [Token(chosen, logprob, row[:top]) for chosen, logprob, row, top in rows]
