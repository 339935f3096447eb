"""Log probabilities of prompts, and sequences with penalties, as engines compute them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from penstock.engine import embedded_model
from penstock.engine.api import Past, Scored, Slice, Step
from penstock.engine.embedded import EmbeddedEngine, Options
from penstock.request import Sampling, Token
from tests.engine.embedded.driver import GREEDY, Driver, generated, prompts
from tests.models import VOCABULARY
from tests.support import run

Checkpoint = Callable[[str], Path]
TOP = 3
PENALIZED = Sampling(
    max_tokens=24,
    temperature=1.3,
    seed=5,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    logit_bias=((9, 2.0), (17, -4.0)),
    bad_words=((40,), (9, 50)),
    min_tokens=20,
    stop_token_ids=(9, 10, 11),
)


def engine_of(folder: Path) -> EmbeddedEngine:
    return EmbeddedEngine(Options(str(folder), device="cpu", threads=1))


def full_forward(folder: Path, prompt: Sequence[int]) -> torch.Tensor:
    """Log probabilities [token, vocabulary] of what follows each token, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([prompt])).logits[0]
    return logits.log_softmax(-1)


def assert_scores(scored: Sequence[Token], prompt: Sequence[int], expected: torch.Tensor, top: int) -> None:
    """`expected` is what `full_forward` says of `prompt`."""
    assert [token.id for token in scored] == list(prompt[1:])
    for token, row in zip(scored, expected, strict=False):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
        assert [logprob for _, logprob in token.top] == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)
        assert [row[found].item() for found, _ in token.top] == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize(("chunks", "at_once"), [([45], 1000), ([20, 1, 24], 7), ([44, 1], 1)])
def test_scores_of_a_prompt_are_those_of_a_full_forward(
    checkpoint: Checkpoint, architecture: str, chunks: list[int], at_once: int
) -> None:
    folder = checkpoint(architecture)
    (prompt,) = prompts(45)

    async def serve() -> list[Scored]:
        async with engine_of(folder) as engine:
            driver = Driver(engine)
            sequence, scored, start = driver.start(prompt, 1), [], 0
            for chunk in chunks:
                part = prompt[start : start + chunk]
                sampling = GREEDY if start + chunk == len(prompt) else None
                scored += await engine.score(
                    Step(driver.region, [Slice(part, start, sequence.blocks, sampling, sequence.past, TOP)])
                )
                start += chunk
            return scored

    with patch.object(embedded_model, "_SCORED_LOGITS", at_once * VOCABULARY):
        scored = run(serve())
    assert_scores([token for part in scored for token in part.prompt], prompt, full_forward(folder, prompt), TOP)
    *before, last = [part.sampled for part in scored]
    assert before == [None] * (len(chunks) - 1)
    assert last is not None and [last.id] == generated(folder, prompt, 1)


def test_neighbours_of_a_prompt_that_is_scored_are_not_disturbed(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    mine, theirs, whole = prompts(30, 21, 12)

    async def serve() -> list[Scored]:
        async with engine_of(folder) as engine:
            driver = Driver(engine)
            one, two, three = (driver.start(prompt, 1) for prompt in (mine, theirs, whole))
            return await engine.score(
                Step(
                    driver.region,
                    [
                        Slice(theirs, 0, two.blocks, GREEDY, two.past),
                        Slice(mine, 0, one.blocks, GREEDY, one.past, 0),
                        Slice(whole[:5], 0, three.blocks, None, three.past),
                    ],
                )
            )

    first, second, third = run(serve())
    assert first.sampled is not None and [first.sampled.id] == generated(folder, theirs, 1)
    assert first.prompt == third.prompt == () and third.sampled is None
    assert_scores(second.prompt, mine, full_forward(folder, mine), 0)


def test_the_output_of_a_sequence_that_goes_on_is_not_scored(checkpoint: Checkpoint) -> None:
    """Nor is there anything to tell of a prompt of one token."""
    folder = checkpoint("llama")
    (tokens,) = prompts(12)

    async def serve() -> list[Scored]:
        async with engine_of(folder) as engine:
            driver = Driver(engine)
            blocks = driver.start(tokens, 1).blocks
            pasts = [Past(str(count), array("I", tokens), count) for count in (8, 1)]
            return [
                scored
                for past in pasts
                for scored in await engine.score(Step(driver.region, [Slice(tokens, 0, blocks, GREEDY, past, 0)]))
            ]

    eight, one = run(serve())
    assert_scores(eight.prompt, tokens[:8], full_forward(folder, tokens), 0)
    assert one.prompt == [] and one.sampled == eight.sampled


@pytest.mark.parametrize("handed_over", [0, 1, 9])
def test_another_engine_goes_on_with_penalties_and_bans(checkpoint: Checkpoint, handed_over: int) -> None:
    """In the same blocks, after so many tokens; all it is told is the tokens so far."""
    folder = checkpoint("llama")
    (prompt,) = prompts(33)

    async def serve(engines: int) -> list[int]:
        async with engine_of(folder) as first, engine_of(folder) as second:
            driver = Driver(first)
            sequence = driver.start(prompt, 24, PENALIZED)
            await driver.step((sequence, 32 if handed_over == 0 else 33))
            await driver.decode([sequence], handed_over)
            if engines == 2:
                driver = Driver(second, driver.region)
                sequence.past = Past("elsewhere", array("I", sequence.tokens), len(prompt))
            await driver.decode([sequence], 24)
            return sequence.ids

    alone, taken_over = run(serve(1)), run(serve(2))
    assert taken_over == alone
    assert 40 not in alone and not {9, 10, 11} & set(alone[:20])


def test_the_ends_of_the_model_are_banned_up_to_min_tokens(checkpoint: Checkpoint) -> None:
    """Even where a bias makes them certain."""
    folder = checkpoint("llama")
    (prompt,) = prompts(10)

    async def serve(ignore_eos: bool) -> list[int]:
        async with engine_of(folder) as engine:
            (eos,) = engine.info.eos_token_ids
            sampling = Sampling(6, 0.0, logit_bias=((eos, 100.0),), min_tokens=3, ignore_eos=ignore_eos)
            driver = Driver(engine)
            sequence = driver.start(prompt, 6, sampling)
            await driver.step((sequence, 10))
            await driver.decode([sequence], 6)
            return [token for token, sampled in enumerate(sequence.ids) if sampled == eos]

    assert run(serve(False)) == [3, 4, 5]
    assert run(serve(True)) == [0, 1, 2, 3, 4, 5]
