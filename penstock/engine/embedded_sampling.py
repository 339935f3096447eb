"""Chooses tokens from logits: greedy, or by temperature, top_k and top_p; and their log probabilities.

Rows do not see each other: the same logits, sampling and position give the same token alone or in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from penstock.engine.chance import uniform
from penstock.request import Sampling, Token


@dataclass(frozen=True, slots=True)
class Draw:
    """One row of logits: how to choose from it, and the position of the token that is chosen."""

    sampling: Sampling
    position: int


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[Token]:
    """One token for each row of `logits` [rows, vocabulary], of any floating dtype.

    Raises ValueError where a row holds no distribution: damaged keys and values, or a dtype that overflowed.
    """
    logits = logits.float()
    best, ids = _best(logits)
    if not best.isfinite().all():
        positions = [draw.position for draw, top in zip(draws, best.tolist(), strict=True) if not isfinite(top)]
        raise ValueError(f"the logits for positions {positions} of their sequences are not finite")
    chance = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if chance:
        for row, drawn in zip(chance, _draw(logits[chance], [draws[row] for row in chance]), strict=True):
            ids[row] = drawn
    tokens = [Token(chosen) for chosen in ids]
    asked = [row for row, draw in enumerate(draws) if draw.sampling.logprobs is not None]
    if asked:
        tops = [draws[row].sampling.logprobs or 0 for row in asked]
        with_logprobs = _with_logprobs(logits[asked], [ids[row] for row in asked], tops)
        for row, token in zip(asked, with_logprobs, strict=True):
            tokens[row] = token
    return tokens


def _best(logits: Tensor) -> tuple[Tensor, list[int]]:
    """Each row's highest logit, and the first token that has it. A NaN counts as highest."""
    if logits.device.type != "cpu":
        best, greedy = logits.max(-1)
        return best, greedy.tolist()
    greedy = torch.from_numpy(logits.numpy().argmax(-1))  # ten times as quick as torch's on the CPU
    return logits.gather(-1, greedy[:, None])[:, 0], greedy.tolist()


def _draw(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Inverts each row's distribution function, with tokens in the order of their ids, at the row's uniform.

    By id and not by probability: rounding, which differs between shapes of batches, would swap near equals in a
    sorted order, whereas here it only shifts the boundaries between tokens.
    """
    samplings = [draw.sampling for draw in draws]
    temperatures = logits.new_tensor([s.temperature for s in samplings])[:, None]
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperatures
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


def _with_logprobs(logits: Tensor, ids: Sequence[int], tops: Sequence[int]) -> list[Token]:
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
