"""Sampling against a plain reference, against transformers, and against the distributions it should have."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from penstock.engine.api import Past, SequencesFailed
from penstock.engine.embedded_sampling import Draw, Sampler
from penstock.request import Sampling, Token
from tests.engine.embedded import reference

VOCABULARY = 14
EOS = (0, 3)
ONE = Sampling(max_tokens=1)
GREEDY = Sampling(max_tokens=1, temperature=0)

ids = st.integers(0, VOCABULARY - 1)
samplings = st.builds(
    Sampling,
    max_tokens=st.just(1),
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 5, VOCABULARY, 10 * VOCABULARY]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 10.0]),
    presence_penalty=st.sampled_from([0.0, -2.0, 0.7, 2.0]),
    frequency_penalty=st.sampled_from([0.0, -0.3, 0.4, 2.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    choice=st.integers(0, 3),
    stop_token_ids=st.lists(ids, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    min_tokens=st.integers(0, 6),
    logit_bias=st.dictionaries(ids, st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=3).map(
        lambda biases: tuple(biases.items())
    ),
    bad_words=st.lists(st.lists(ids, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
    logprobs=st.sampled_from([None, 0, 1, 5, 10 * VOCABULARY]),
)


@dataclass(frozen=True)
class Row:
    """One sequence at one token."""

    sampling: Sampling
    prompt: list[int]
    output: list[int]
    seed: int  # of its logits

    @property
    def logits(self) -> Tensor:
        return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(self.seed)) * 3

    def draw(self, name: str = "") -> Draw:
        return Draw(self.sampling, len(self.prompt) + len(self.output), past(self.prompt, self.output, name))


rows = st.builds(
    Row,
    sampling=samplings,
    prompt=st.lists(ids, min_size=1, max_size=12),
    output=st.lists(ids, max_size=12),
    seed=st.integers(0, 2**31),
)


def past(prompt: Sequence[int], output: Sequence[int], name: str = "") -> Past:
    return Past(name, array("I", [*prompt, *output]), len(prompt))


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[Token]:
    return Sampler(EOS).sample(logits, draws)


# Against the reference


@settings(max_examples=400, deadline=None)
@given(st.lists(rows, min_size=1, max_size=6))
def test_every_row_of_a_batch_follows_the_reference(batch: list[Row]) -> None:
    draws = [row.draw(f"r{index}") for index, row in enumerate(batch)]
    tokens = sample(torch.stack([row.logits for row in batch]), draws)
    for row, token in zip(batch, tokens, strict=True):
        assert token.id == reference.choose(row.logits.tolist(), row.sampling, row.prompt, row.output, EOS)
        assert_logprobs(token, row.logits, row.sampling.logprobs)


@settings(max_examples=100, deadline=None)
@given(st.lists(rows, min_size=2, max_size=6))
def test_neighbours_do_not_matter(batch: list[Row]) -> None:
    together = sample(torch.stack([row.logits for row in batch]), [row.draw() for row in batch])
    alone = [sample(row.logits[None], [row.draw()])[0].id for row in batch]
    assert [token.id for token in together] == alone


@settings(max_examples=50, deadline=None)
@given(rows, st.integers(0, 2**31))
def test_a_sequence_that_grows_follows_the_reference(row: Row, seed: int) -> None:
    """One sampler step after step, and one that takes over in the middle, with nothing but the tokens."""
    sampler, draw, output = Sampler(EOS), row.draw("it"), list(row.output)
    for step in range(8):
        logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed + step))
        if step == 4:
            sampler, draw = Sampler(EOS), taken_over(draw, row.prompt, output)
        (token,) = sampler.sample(logits, [Draw(draw.sampling, len(draw.past.tokens), draw.past)])
        assert token.id == reference.choose(logits[0].tolist(), row.sampling, row.prompt, output, EOS)
        draw.past.tokens.append(token.id)
        output.append(token.id)


def taken_over(draw: Draw, prompt: list[int], output: list[int]) -> Draw:
    return Draw(draw.sampling, draw.position, past(prompt, output, "elsewhere"))


def assert_logprobs(token: Token, row: Tensor, top: int | None) -> None:
    """Of the model's distribution, whatever is done to it before the choice."""
    if top is None:
        assert token.logprob is None
        assert token.top == ()
        return
    expected = row.log_softmax(-1)
    assert token.logprob == pytest.approx(expected[token.id].item(), abs=1e-6)
    likeliest = expected.topk(min(top, VOCABULARY)) if top else None
    assert [found for found, _ in token.top] == ([] if likeliest is None else likeliest.indices.tolist())
    assert all(logprob == pytest.approx(expected[found].item(), abs=1e-6) for found, logprob in token.top)


def test_two_sequences_of_one_name_are_not_confused() -> None:
    sampler, penalized = Sampler(), structs.replace(GREEDY, frequency_penalty=2.0)
    logits = torch.tensor([[1.0, 0.5, 0.0]])
    for output, expected in (([0], 1), ([1], 0), ([0, 0, 1], 2)):
        (token,) = sampler.sample(logits, [Draw(penalized, 1 + len(output), past([2], output, "same"))])
        assert token.id == expected


# Against transformers


def kept(sampling: Sampling, logits: Tensor, tokens: int) -> set[int]:
    """What is drawn at all, over many positions."""
    draws = [Draw(sampling, position) for position in range(tokens)]
    return {token.id for token in sample(logits.expand(tokens, -1), draws)}


@pytest.mark.parametrize(
    ("sampling", "processor"),
    [
        (structs.replace(ONE, top_k=4), TopKLogitsWarper(4)),
        (structs.replace(ONE, top_p=0.8), TopPLogitsWarper(0.8)),
        (structs.replace(ONE, min_p=0.2), MinPLogitsWarper(0.2)),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_cut_off_is_what_transformers_cuts_off(
    sampling: Sampling, processor: LogitsProcessor, seed: int
) -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    theirs = processor(torch.zeros(1, 1, dtype=torch.long), logits[None])[0]
    assert kept(sampling, logits, 2000) == set(theirs.isfinite().nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    ("sampling", "processors"),
    [
        (structs.replace(GREEDY, repetition_penalty=1.7), [RepetitionPenaltyLogitsProcessor(1.7)]),
        (structs.replace(GREEDY, bad_words=((5,), (1, 2), (4, 1, 6))), [
            NoBadWordsLogitsProcessor([[5], [1, 2], [4, 1, 6]], list(EOS))
        ]),
        (structs.replace(GREEDY, min_tokens=9), [MinNewTokensLengthLogitsProcessor(0, 9, list(EOS))]),
    ],
)  # fmt: skip
@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(0, 6), min_size=1, max_size=12), seed=st.integers(0, 2**31))
def test_greedy_outputs_are_those_of_transformers_processors(
    sampling: Sampling, processors: list[LogitsProcessor], tokens: list[int], seed: int
) -> None:
    """They do not tell prompt from output, so all is output here."""
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(seed))
    theirs = logits.clone()
    for processor in processors:
        theirs = processor(torch.tensor([tokens]), theirs)
    (token,) = sample(logits, [Draw(sampling, len(tokens), past([], tokens))])
    assert token.id == theirs.argmax().item()


# Distributions


def assert_distributed(drawn: Sequence[int], chances: dict[int, float]) -> None:
    """Pearson's chi-square at 5 standard deviations; nothing that cannot come has come."""
    found = np.bincount(drawn, minlength=VOCABULARY)
    assert set(np.flatnonzero(found).tolist()) <= set(chances)
    expected = np.array([chances.get(token, 0.0) for token in range(VOCABULARY)]) * len(drawn)
    likely = expected >= 5
    deviations = (found[likely] - expected[likely]) ** 2 / expected[likely]
    freedom = likely.sum() - 1
    assert deviations.sum() <= freedom + 5 * np.sqrt(2 * freedom)


DISTRIBUTED = [
    structs.replace(ONE, temperature=0.8),
    structs.replace(ONE, temperature=2.0, top_k=6),
    structs.replace(ONE, temperature=1.5, top_p=0.9),
    structs.replace(ONE, temperature=2.5, min_p=0.1),
    structs.replace(ONE, temperature=1.5, min_p=0.02, top_k=9, top_p=0.95),
    structs.replace(ONE, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3, temperature=2.0),
    structs.replace(ONE, logit_bias=((2, 3.0), (5, -2.0)), bad_words=((1,), (6, 4)), min_tokens=9, temperature=3.0),
]


@pytest.mark.parametrize("sampling", DISTRIBUTED)
@pytest.mark.parametrize("seed", [1, 2])
def test_draws_are_distributed_as_they_should_be(sampling: Sampling, seed: int) -> None:
    """Over positions, with everything else as it is; over seeds, too."""
    prompt, output, count = [1, 2, 7], [5, 5, 6], 4000
    logits = Row(sampling, prompt, output, seed).logits
    before = past(prompt, output)
    chances = reference.chances(reference.changed(logits.tolist(), sampling, prompt, output, EOS), sampling)
    by_position = [Draw(structs.replace(sampling, seed=seed), position, before) for position in range(count)]
    by_seed = [Draw(structs.replace(sampling, seed=other), 6, before) for other in range(count)]
    by_choice = [Draw(structs.replace(sampling, seed=seed, choice=choice), 6, before) for choice in range(count)]
    for draws in (by_position, by_seed, by_choice):
        drawn = [token.id for token in sample(logits.expand(count, -1), draws)]
        assert_distributed(drawn, chances)


def test_a_wrong_distribution_is_noticed() -> None:
    sampling = structs.replace(ONE, temperature=0.8)
    logits = Row(sampling, [1], [], 1).logits
    drawn = [token.id for token in sample(logits.expand(4000, -1), [Draw(sampling, at) for at in range(4000)])]
    slightly_warmer = structs.replace(sampling, temperature=0.9)
    with pytest.raises(AssertionError):
        assert_distributed(drawn, reference.chances(logits.tolist(), slightly_warmer))


def test_temperatures_are_those_of_transformers() -> None:
    logits = Row(ONE, [1], [], 3).logits
    theirs = TemperatureLogitsWarper(0.6)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0].softmax(-1)
    ours = reference.chances(logits.tolist(), structs.replace(ONE, temperature=0.6))
    assert [ours[token] for token in range(VOCABULARY)] == pytest.approx(theirs.tolist(), abs=1e-6)


# Edges


def test_equals_are_ordered_by_id() -> None:
    level = torch.zeros(1, 8)
    for position in range(50):
        (token,) = sample(level, [Draw(structs.replace(ONE, top_k=3), position)])
        assert token.id < 3
        (token,) = sample(level, [Draw(structs.replace(ONE, top_p=0.25), position)])
        assert token.id < 2


def test_tokens_without_a_chance_are_never_drawn() -> None:
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, [3, 10]] = 0.0
    drawn = {sample(logits, [Draw(ONE, position)])[0].id for position in range(100)}
    assert drawn == {3, 10}


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-45, 1e-46, 5e-324])
def test_at_next_to_no_temperature_the_likeliest_is_drawn(temperature: float) -> None:
    logits = torch.stack([Row(ONE, [1], [], seed).logits for seed in range(4)])
    drawn = sample(logits, [Draw(structs.replace(ONE, temperature=temperature), position) for position in range(4)])
    assert [token.id for token in drawn] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_what_leaves_no_token_is_no_ban(temperature: float, seed: int) -> None:
    """And none of the neighbours' business."""
    plain = structs.replace(ONE, temperature=temperature)
    everything = structs.replace(plain, bad_words=tuple((token,) for token in range(VOCABULARY)))
    beyond_float32 = structs.replace(plain, repetition_penalty=1e-300)
    logits = Row(plain, [1], [], seed).logits.expand(3, -1)
    before = past(range(VOCABULARY), [])
    draws = [Draw(sampling, VOCABULARY, before) for sampling in (everything, beyond_float32, plain)]
    one, two, undisturbed = sample(logits, draws)
    assert one == two == undisturbed == sample(logits[:1], [Draw(plain, VOCABULARY, before)])[0]


def test_tokens_that_the_model_does_not_have_change_nothing() -> None:
    far = 10 * VOCABULARY
    strange = structs.replace(
        GREEDY, logit_bias=((far, 100.0),), bad_words=((far,), ()), stop_token_ids=(far,), min_tokens=5, ignore_eos=True
    )
    logits = torch.stack([Row(GREEDY, [1], [], seed).logits for seed in range(2)])
    tokens = sample(logits, [Draw(strange, 1, past([1], [])), Draw(GREEDY, 1)])
    assert [token.id for token in tokens] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
def test_what_is_no_distribution_fails_its_own_sequence_alone(damage: float) -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[1, 7] = damage
    sound, damaged = (Past(name, array("I", [1]), 1) for name in ("sound", "damaged"))
    with pytest.raises(SequencesFailed, match="damaged: the logits for position 9 are not finite") as caught:
        sample(logits, [Draw(GREEDY, 8, sound), Draw(GREEDY, 9, damaged)])
    assert list(caught.value.errors) == ["damaged"]


def test_bfloat16_logits_are_taken_as_they_are() -> None:
    logits = Row(GREEDY, [1], [], 5).logits.bfloat16()[None]
    (token,) = sample(logits, [Draw(structs.replace(GREEDY, logprobs=0), 1)])
    assert token.id == logits.argmax().item()
    assert token.logprob == pytest.approx(logits.float().log_softmax(-1).max().item(), abs=1e-6)
