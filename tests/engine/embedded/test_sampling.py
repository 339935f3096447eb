"""Sampling against a plain reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.chance import uniform
from penstock.engine.embedded_sampling import Draw, sample
from penstock.request import Sampling, Token

VOCABULARY = 50

samplings = st.builds(
    Sampling,
    max_tokens=st.just(1),
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 20, VOCABULARY, 10 * VOCABULARY]),
    seed=st.integers(-(2**63), 2**63 - 1),
    choice=st.integers(0, 3),
    logprobs=st.sampled_from([None, 0, 1, 5, 10 * VOCABULARY]),
)
rows = st.lists(st.tuples(samplings, st.integers(1, 1000), st.integers(0, 2**31)), min_size=1, max_size=6)


def logits_of(seed: int) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def plainly(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """The definition, one row and one token at a time, in float64."""
    values = logits.double().numpy()
    likeliest = sorted(range(len(values)), key=lambda token: (-values[token], token))
    if sampling.temperature == 0:
        return likeliest[0]
    kept = likeliest[: sampling.top_k or None]
    weights = np.exp((values[kept] - values[kept[0]]) / sampling.temperature)
    before = np.cumsum(weights / weights.sum()) - weights / weights.sum()
    kept = [token for token, likelier in zip(kept, before, strict=True) if likelier < sampling.top_p]
    chances = {token: float(weight) for token, weight in zip(kept, weights, strict=False)}
    target, reached = uniform(sampling.seed, sampling.choice, position) * sum(chances.values()), 0.0
    for token in sorted(kept):
        reached += chances[token]
        if reached > target:
            return token
    raise AssertionError("the uniform is below 1")


@settings(max_examples=200, deadline=None)
@given(rows)
def test_every_row_of_a_batch_follows_the_definition(batch: list[tuple[Sampling, int, int]]) -> None:
    logits = torch.stack([logits_of(seed) for _, _, seed in batch])
    tokens = sample(logits, [Draw(sampling, position) for sampling, position, _ in batch])
    for row, (sampling, position, _), token in zip(logits, batch, tokens, strict=True):
        assert token.id == plainly(row, sampling, position)
        assert_logprobs(token, row, sampling.logprobs)


def assert_logprobs(token: Token, row: torch.Tensor, top: int | None) -> None:
    """Of the model's distribution, whatever the temperature."""
    if top is None:
        assert token.logprob is None
        assert token.top == ()
        return
    expected = row.log_softmax(-1)
    assert token.logprob == pytest.approx(expected[token.id].item(), abs=1e-6)
    likeliest = expected.topk(min(top, VOCABULARY)) if top else None
    assert [found for found, _ in token.top] == ([] if likeliest is None else likeliest.indices.tolist())
    assert all(logprob == pytest.approx(expected[found].item(), abs=1e-6) for found, logprob in token.top)


def test_equals_are_ordered_by_id() -> None:
    level = torch.zeros(1, 8)
    for position in range(50):
        (token,) = sample(level, [Draw(Sampling(max_tokens=1, top_k=3), position)])
        assert token.id < 3
        (token,) = sample(level, [Draw(Sampling(max_tokens=1, top_p=0.25), position)])
        assert token.id < 2


def test_the_distribution_is_the_models() -> None:
    logits = logits_of(11)
    draws = [Draw(Sampling(max_tokens=1, temperature=0.8, seed=4), position) for position in range(20_000)]
    tokens = [token.id for token in sample(logits.expand(len(draws), -1), draws)]
    found = np.bincount(tokens, minlength=VOCABULARY) / len(draws)
    expected = (logits / 0.8).softmax(-1).numpy()
    error = np.sqrt(expected * (1 - expected) / len(draws))
    assert (abs(found - expected) < 5 * error + 1e-4).all()


def test_banned_tokens_are_never_drawn() -> None:
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, [3, 30]] = 0.0
    drawn = {sample(logits, [Draw(Sampling(max_tokens=1), position)])[0].id for position in range(100)}
    assert drawn == {3, 30}


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
def test_what_is_no_distribution_is_an_error(damage: float) -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[1, 7] = damage
    greedy = Sampling(max_tokens=1, temperature=0)
    with pytest.raises(ValueError, match="positions \\[9\\]"):
        sample(logits, [Draw(greedy, 8), Draw(greedy, 9)])


def test_bfloat16_logits_are_taken_as_they_are() -> None:
    logits = logits_of(5).bfloat16()[None]
    (token,) = sample(logits, [Draw(Sampling(max_tokens=1, temperature=0, logprobs=0), 1)])
    assert token.id == logits.argmax().item()
    assert token.logprob == pytest.approx(logits.float().log_softmax(-1).max().item(), abs=1e-6)
