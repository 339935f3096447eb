"""The latency model: fits find the truth, priors give way to evidence, and both say how sure they are."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import MissingExtra, SetupError, UnsupportedModel
from penstock.policy.latency.algebra import solve_nonnegative
from penstock.policy.latency.device import HOST_S, RANKS, cpu
from penstock.policy.latency.fit import Line, OnlineFit, believe, fit_line
from penstock.policy.latency.roofline import Roofline
from penstock.policy.latency.shape import MODELS, Experts, ModelShape, shape_of
from penstock.policy.latency.silicon import Silicon
from penstock.policy.latency.steps import (
    UNKNOWN,
    Mix,
    StepFit,
    StepModel,
    Work,
    chosen_share,
    chunk,
    decode,
    fit_steps,
    prior_of,
    saturating_tokens,
    typical_mixes,
)
from penstock.policy.latency.transfers import MOONCAKE_8X400G, NIXL_H100_READ, TransferFit, over

CERTAIN = ((0.0,) * 5,) * 5
TRUTH = StepModel(Line((7.6e-3, 3.0e-4, 1.6e-7, 1.2e-4, 1.4e-6), CERTAIN))  # a 22 M Llama on one core

prices = st.tuples(
    st.floats(1e-4, 1e-2), st.floats(1e-6, 1e-3), st.floats(1e-10, 1e-6), st.floats(1e-6, 1e-3), st.floats(1e-9, 1e-5)
)
works = st.builds(Work, st.integers(0, 8192), st.floats(0, 1e8), st.integers(0, 256), st.integers(0, 10**6))


def a_work(rng: Random) -> Work:
    """What a worker that does both phases has in one step."""
    batch = rng.randint(1, 32)
    work = decode(batch, batch * rng.randint(10, 2000)) if rng.random() < 0.7 else Work()
    return work + chunk(rng.randint(16, 512), rng.randint(0, 1500)) if rng.random() < 0.6 or work == Work() else work


def observations(model: StepModel, count: int, seed: int, noise: float = 0.05) -> list[tuple[Work, float]]:
    rng = Random(seed)
    drawn = [a_work(rng) for _ in range(count)]
    return [(work, model.seconds(work) * math.exp(rng.gauss(0, noise))) for work in drawn]


def learn(fit: StepFit, seen: list[tuple[Work, float]]) -> StepModel:
    for work, seconds in seen:
        fit.observe(work, seconds)
    return fit.model


def errors(model: StepModel, truth: StepModel = TRUTH) -> list[float]:
    """Relative, over steps that the fit has not seen; the least first."""
    return sorted(abs(model.seconds(work) / taken - 1) for work, taken in observations(truth, 101, seed=99, noise=0))


def worst_error(model: StepModel, truth: StepModel = TRUTH) -> float:
    return errors(model, truth)[-1]


@given(prices, st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_a_batch_fit_finds_the_prices(truth: tuple[float, ...], seed: int) -> None:
    model = StepModel(Line(truth, CERTAIN))
    seen = observations(model, 600, seed, noise=0.03)
    assert worst_error(fit_steps(*map(list, zip(*seen, strict=True))), model) < 0.1


@given(prices, st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_an_online_fit_finds_the_prices_whatever_its_prior(truth: tuple[float, ...], seed: int) -> None:
    model = StepModel(Line(truth, CERTAIN))
    assert worst_error(learn(StepFit(), observations(model, 1500, seed, noise=0.03)), model) < 0.1


def test_outliers_do_not_spoil_a_fit() -> None:
    rng = Random(3)
    seen = observations(TRUTH, 600, seed=1)
    seen = [(work, seconds * (30 if rng.random() < 0.05 else 1)) for work, seconds in seen]
    assert worst_error(learn(StepFit(), seen)) < 0.1
    assert worst_error(fit_steps(*map(list, zip(*seen, strict=True)))) < 0.1


def test_without_evidence_the_prior_is_believed_and_doubted_as_told() -> None:
    prior = StepModel(believe(TRUTH.line.prices, doubt=0.5))
    for work, seconds in observations(TRUTH, 20, seed=1, noise=0):
        estimate = StepFit(prior).model.estimate(work)
        assert estimate.seconds == pytest.approx(seconds)
        assert 0.35 * seconds <= estimate.error_s <= 0.5001 * seconds


def test_evidence_overrides_a_prior_that_is_three_times_off() -> None:
    fast = StepModel(believe([price / 3 for price in TRUTH.line.prices], doubt=0.5))
    fit = StepFit(fast)
    seen = observations(TRUTH, 600, seed=2)
    learn(fit, seen[:5])
    assert 0.05 < worst_error(fit.model) < 0.67  # it has begun to learn
    assert worst_error(learn(fit, seen[5:])) < 0.05


def test_a_few_decode_steps_also_say_how_fast_the_device_is() -> None:
    prior = StepModel(believe(TRUTH.line.prices, doubt=0.5))
    fit = StepFit(prior)
    step = decode(8, 4000)
    for _ in range(10):
        fit.observe(step, 2 * TRUTH.seconds(step))
    assert fit.model.seconds(step) == pytest.approx(2 * TRUTH.seconds(step), rel=0.05)
    assert 1.2 < fit.model.seconds(chunk(512)) / TRUTH.seconds(chunk(512)) < 2


def test_uncertainty_shrinks_where_there_is_evidence_and_not_elsewhere() -> None:
    fit = StepFit(StepModel(believe(TRUTH.line.prices, doubt=0.5)))
    step, other = decode(8, 4000), chunk(512, 1000)
    told = []
    for count in (2, 20, 200):
        rng = Random(count)
        for _ in range(count):
            fit.observe(step, TRUTH.seconds(step) * math.exp(rng.gauss(0, 0.05)))
        told.append(fit.model.estimate(step).error_s / TRUTH.seconds(step))
    assert told == sorted(told, reverse=True)
    assert told[-1] < 0.02
    assert fit.model.estimate(other).error_s > 0.2 * TRUTH.seconds(other)


def test_errors_are_about_as_large_as_told() -> None:
    beyond = 0
    for seed in range(40):
        model = learn(StepFit(), observations(TRUTH, 200, seed))
        work = a_work(Random(seed + 1000))
        estimate = model.estimate(work)
        beyond += abs(estimate.seconds - TRUTH.seconds(work)) > 2 * estimate.error_s
        assert estimate.scatter_s == pytest.approx(0.05 * estimate.seconds, rel=0.6)
    assert beyond <= 8  # 2 of 40 with Gaussian errors and a known scatter


def test_what_is_not_seen_any_more_is_not_forgotten() -> None:
    fit = StepFit(StepModel(believe([price / 3 for price in TRUTH.line.prices], doubt=0.5)))
    before = learn(fit, observations(TRUTH, 500, seed=5))
    rng = Random(6)
    only_decodes = [decode(batch, batch * 500) for batch in (rng.randint(1, 4) for _ in range(5000))]
    after = learn(fit, [(work, TRUTH.seconds(work)) for work in only_decodes])
    long = chunk(512, 500)
    assert after.seconds(long) == pytest.approx(before.seconds(long), rel=0.02)
    assert after.estimate(long).error_s < 0.05 * after.seconds(long)


def test_a_machine_that_becomes_slower_is_followed() -> None:
    slower = StepModel(Line(tuple(2 * price for price in TRUTH.line.prices), CERTAIN))
    fit = StepFit()
    learn(fit, observations(TRUTH, 2000, seed=7))
    assert errors(learn(fit, observations(slower, 1000, seed=8)), slower)[50] < 0.1


@given(prices, st.sampled_from([0, 32, 512]), st.sampled_from([0.0, 0.1]), works, works)
def test_more_work_never_takes_less(some: tuple[float, ...], free: int, share: float, work: Work, more: Work) -> None:
    line = Line((*some, 0.01) if share else some, ())
    model = StepModel(line, free, share)
    assert 0 < model.seconds(work) <= model.seconds(work + more) * (1 + 1e-12)


@given(st.lists(st.tuples(works, st.floats(0, 1e4)), max_size=60))
@settings(deadline=None)
def test_any_history_leaves_a_usable_model(history: list[tuple[Work, float]]) -> None:
    model = learn(StepFit(), history)
    assert all(0 <= price < math.inf for price in model.line.prices)
    estimate = model.estimate(chunk(512, 100))
    assert 0 <= estimate.seconds < math.inf and 0 <= estimate.error_s < math.inf


@pytest.mark.parametrize("seconds", [-1.0, math.inf, math.nan])
def test_impossible_times_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="cannot take"):
        StepFit().observe(decode(1, 10), seconds)


def test_the_same_step_for_ever_stays_exact() -> None:
    fit = StepFit()
    for _ in range(20_000):
        fit.observe(decode(4, 2000), 0.01)
    assert fit.model.seconds(decode(4, 2000)) == pytest.approx(0.01, rel=1e-3)


def test_a_model_fits_into_a_report() -> None:
    model = learn(StepFit(), observations(TRUTH, 50, seed=1))
    packed = msgspec.msgpack.encode(model)
    assert msgspec.msgpack.decode(packed, type=StepModel) == model
    assert len(packed) < 400


def test_priors_and_batches_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        believe((1.0, 0.0), doubt=0.5)
    with pytest.raises(ValueError, match="positive"):
        believe((1.0, 1.0), doubt=0)
    with pytest.raises(ValueError, match="measurements"):
        fit_line([], [])
    with pytest.raises(ValueError, match="measurements"):
        fit_line([(1.0,)], [0.0])


@given(
    st.lists(st.lists(st.floats(-3, 3), min_size=4, max_size=4), min_size=4, max_size=4),
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
)
def test_the_solution_is_the_best_of_those_without_a_negative_part(
    rows: list[list[float]], vector: list[float]
) -> None:
    size = range(4)
    matrix = [[sum(row[i] * row[j] for row in rows) + 0.1 * (i == j) for j in size] for i in size]
    solution = solve_nonnegative(matrix, vector)
    pull = [vector[i] - sum(matrix[i][j] * solution[j] for j in size) for i in size]
    assert min(solution) >= 0
    assert all(p <= 1e-6 for p in pull)  # nothing would gain from growing,
    assert all(abs(p) <= 1e-6 for p, part in zip(pull, solution, strict=True) if part > 0)  # nor from shrinking


def test_an_online_fit_agrees_with_a_batch_fit() -> None:
    rng = Random(1)
    rows = [(1.0, rng.random(), 10 * rng.random()) for _ in range(300)]
    seconds = [(2 * a + 3 * b + 0.5 * c) * math.exp(rng.gauss(0, 0.02)) for a, b, c in rows]
    online = OnlineFit(believe((1, 1, 1), doubt=3), memory=math.inf)
    for row, taken in zip(rows, seconds, strict=True):
        online.observe(row, taken)
    batch = fit_line(rows, seconds)
    assert fit_line([(*row, 0.0) for row in rows], seconds).prices == pytest.approx((*batch.prices, 0.0))
    assert online.line.prices == pytest.approx(batch.prices, rel=0.03)
    assert batch.prices == pytest.approx((2, 3, 0.5), rel=0.03)


@given(st.integers(0, 5000), st.integers(0, 3000), st.integers(1, 700), st.sampled_from([0, 64]))
def test_a_prompt_takes_as_long_as_its_chunks(tokens: int, context: int, at_once: int, free: int) -> None:
    model = StepModel(TRUTH.line, free)
    cuts = [*range(0, tokens, at_once), tokens]
    steps = [chunk(end - start, context + start) for start, end in itertools.pairwise(cuts)] if tokens else []
    assert model.prompt_s(tokens, context, at_once) == pytest.approx(sum(map(model.seconds, steps)))


def test_free_tokens_are_found() -> None:
    kinked = StepModel(TRUTH.line, free_tokens=256)
    seen = [(work, kinked.seconds(work)) for work in (mix.work for mix in typical_mixes())]
    assert fit_steps(*map(list, zip(*seen, strict=True))).free_tokens == 256


def test_saturation_is_where_the_fixed_part_stops_to_matter() -> None:
    linear = StepModel(Line((0.010, 0.001, 0.0, 0.0, 0.0), CERTAIN))
    assert saturating_tokens(linear, context=0, most=1000) == 159  # 159 / 169 is 0.95 of 1000 / 1010
    curved = StepModel(Line((0.010, 0.001, 1e-6, 0.0, 0.0), CERTAIN))
    most = saturating_tokens(curved, 0, 4000)
    assert most == saturating_tokens(curved, 0, 8000) < 159  # attention makes long chunks slower again


# Sizes


@pytest.mark.parametrize(
    ("model", "token_bytes", "parameters", "gib_at_8k", "gib_at_128k"),
    [
        ("Llama-3-8B", 131_072, 8.03e9, 1.0, 16),
        ("Llama-3-70B", 327_680, 70.6e9, 2.5, 40),
        ("Llama-3.1-405B", 516_096, 406e9, 3.94, 63),
        ("Qwen3-32B", 262_144, 32.8e9, 2.0, 32),
        ("Qwen3-8B", 147_456, 8.19e9, 1.125, 18),
        ("Qwen3-30B-A3B", 98_304, 30.5e9, 0.75, 12),
        ("gpt-oss-120b", 73_728, 116.8e9, 0.2856, 4.504),
        ("DeepSeek-V3", 70_272, 671e9, 0.536, 8.58),
    ],
)
def test_sizes_of_well_known_models(
    model: str, token_bytes: int, parameters: float, gib_at_8k: float, gib_at_128k: float
) -> None:
    shape = MODELS[model]
    assert shape.kv_token_bytes == token_bytes
    assert shape.parameters == pytest.approx(parameters, rel=0.003)
    assert shape.kv_held_bytes(8192) / 2**30 == pytest.approx(gib_at_8k, rel=0.001)
    assert shape.kv_held_bytes(131_072) / 2**30 == pytest.approx(gib_at_128k, rel=0.001)


def test_a_mixture_activates_a_part_of_itself() -> None:
    assert MODELS["DeepSeek-V3"].active_parameters == pytest.approx(35.7e9, rel=0.01)  # 36.6 with the output head
    assert MODELS["gpt-oss-120b"].active_parameters == pytest.approx(4.55e9, rel=0.01)  # 5.1 with it
    assert MODELS["Qwen3-30B-A3B"].active_parameters == pytest.approx(2.73e9, rel=0.01)
    assert MODELS["Llama-3-8B"].expert_share == 0
    assert chosen_share(1, 1 / 16) == 1 / 16
    assert chosen_share(200, 1 / 16) == pytest.approx(1, abs=1e-5)


LLAMA_3_70B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN_3_30B = {
    **LLAMA_3_70B,
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 151_936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 48,
}
GPT_OSS = {
    **LLAMA_3_70B,
    "model_type": "gpt_oss",
    "torch_dtype": None,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "vocab_size": 201_088,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "quantization_config": {"quant_method": "mxfp4"},
}
DEEPSEEK_V3 = {
    **LLAMA_3_70B,
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "vocab_size": 129_280,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "quantization_config": {"quant_method": "fp8"},
}


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (LLAMA_3_70B, "Llama-3-70B"),
        ({"text_config": LLAMA_3_70B, "vision_config": {}}, "Llama-3-70B"),
        (QWEN_3_30B, "Qwen3-30B-A3B"),
        (GPT_OSS, "gpt-oss-120b"),
        (DEEPSEEK_V3, "DeepSeek-V3"),
    ],
)
def test_a_shape_is_read_from_config_json(config: dict[str, Any], model: str) -> None:
    assert shape_of(config) == MODELS[model]


def test_the_fields_of_other_families() -> None:
    mixtral = shape_of(LLAMA_3_70B | {"num_local_experts": 8, "num_experts_per_tok": 2})
    assert mixtral.experts == Experts(count=8, active=2, ffn=28_672, layers=80)
    sparse = shape_of(QWEN_3_30B | {"decoder_sparse_step": 2, "mlp_only_layers": [1], "num_hidden_layers": 8})
    assert sparse.experts is not None and sparse.experts.layers == 3
    qwen_2 = LLAMA_3_70B | {"sliding_window": 4096, "max_window_layers": 70}
    assert shape_of(qwen_2 | {"use_sliding_window": True}).windowed_layers == 10
    assert shape_of(qwen_2 | {"use_sliding_window": False}).windowed_layers == 0
    assert shape_of(LLAMA_3_70B | {"sliding_window": 4096}).windowed_layers == 80
    assert shape_of({**LLAMA_3_70B, "model_type": "gemma2", "tie_word_embeddings": None}).is_tied
    single = shape_of({**LLAMA_3_70B, "torch_dtype": "float32"})
    assert (single.dtype, single.weight_bytes, single.kv_token_bytes) == ("float32", 4, 2 * 327_680)
    plain = shape_of({key: value for key, value in LLAMA_3_70B.items() if key != "num_key_value_heads"})
    assert (plain.kv_heads, plain.head_dim) == (64, 128)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"mamba_num_heads": 8}, "mamba_num_heads"),
    ],
)
def test_a_model_whose_size_cannot_be_told_is_refused(change: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedModel, match=what):
        shape_of(LLAMA_3_70B | change)


# Roofline

# Kernel times in ms of aiconfigurator-core 0.12 for vLLM: tensor parallelism; chunk, context, sequences, depth.
TABLES = (
    ("Llama-3-8B", "H100", 1, Mix(512), 12.0),
    ("Llama-3-8B", "H100", 1, Mix(8192), 199.7),
    ("Llama-3-8B", "H100", 1, Mix(2048, 32_768), 96.2),
    ("Llama-3-8B", "H100", 1, Mix(0, 0, 1, 1024), 6.2),
    ("Llama-3-8B", "H100", 1, Mix(0, 0, 128, 1024), 12.8),
    ("Llama-3-70B", "H100", 8, Mix(2048), 85.9),
    ("Llama-3-70B", "H100", 8, Mix(0, 0, 1, 1024), 10.1),
    ("Llama-3-70B", "H100", 8, Mix(0, 0, 32, 8192), 14.4),
    ("Llama-3-70B", "H200", 4, Mix(8192), 542.5),
    ("Llama-3-70B", "H200", 4, Mix(0, 0, 256, 1024), 26.5),
    ("Llama-3.1-405B", "H100", 8, Mix(2048), 375.7),
    ("Llama-3.1-405B", "H100", 8, Mix(0, 0, 32, 1024), 43.7),
    ("Llama-3-8B", "A100", 1, Mix(2048), 125.2),
    ("Llama-3-8B", "A100", 1, Mix(0, 0, 32, 1024), 15.6),
    ("Qwen3-30B-A3B", "H100", 1, Mix(8192), 153.2),
    ("Qwen3-30B-A3B", "H100", 1, Mix(0, 0, 32, 1024), 20.8),
)


@pytest.mark.parametrize(("model", "device", "gpus", "mix", "kernels_ms"), TABLES)
def test_the_roofline_comes_near_measured_tables(
    model: str, device: str, gpus: int, mix: Mix, kernels_ms: float
) -> None:
    roofline = Roofline(MODELS[model], RANKS[device], gpus)
    assert (roofline.step_s(mix) - RANKS[device].host_s) * 1e3 == pytest.approx(kernels_ms, rel=0.22)


@pytest.mark.parametrize("model", MODELS)
def test_more_takes_longer_and_more_gpus_less(model: str) -> None:
    def step_s(mix: Mix, gpus: int = 8) -> float:
        return Roofline(MODELS[model], RANKS["H200"], gpus).step_s(mix)

    assert step_s(Mix()) == 0
    assert step_s(Mix(512)) < step_s(Mix(512, 4096)) < step_s(Mix(1024, 4096)) < step_s(Mix(1024, 4096, 8, 4096))
    assert step_s(Mix(0, 0, 8, 4096)) < step_s(Mix(0, 0, 8, 8192)) < step_s(Mix(0, 0, 16, 8192))
    assert step_s(Mix(8192), gpus=8) < step_s(Mix(8192), gpus=4)


def test_a_window_bounds_attention() -> None:
    whole = MODELS["Llama-3-8B"]
    windowed = msgspec.structs.replace(whole, window=1024, windowed_layers=32)
    for mix in (Mix(512, 16_384), Mix(0, 0, 64, 16_384)):
        near = msgspec.structs.replace(windowed, window=100_000)
        seconds = [Roofline(shape, RANKS["H100"]).step_s(mix) for shape in (windowed, near, whole)]
        assert seconds[0] < seconds[1] == pytest.approx(seconds[2])
    assert Roofline(windowed, RANKS["H100"]).step_s(Mix(512)) == Roofline(whole, RANKS["H100"]).step_s(Mix(512))


def test_a_latent_is_read_by_every_gpu() -> None:
    one, eight = (Roofline(MODELS["DeepSeek-V3"], RANKS["H200"], gpus) for gpus in (1, 8))
    deep, shallow = Mix(0, 0, 64, 30_000), Mix(0, 0, 64, 1)
    more = [roofline.step_s(deep) - roofline.step_s(shallow) for roofline in (one, eight)]
    assert more[1] > 0.5 * more[0]


@pytest.mark.parametrize(("model", "gpus"), [("Llama-3-8B", 1), ("Llama-3-70B", 8), ("Qwen3-30B-A3B", 1)])
def test_a_prior_resembles_its_roofline(model: str, gpus: int) -> None:
    roofline = Roofline(MODELS[model], RANKS["H100"], gpus)
    prior = roofline.prior()
    off = sorted(abs(prior.seconds(mix.work) / roofline.step_s(mix) - 1) for mix in typical_mixes())
    assert off[len(off) // 2] < 0.05
    assert off[-1] < 0.35
    assert prior.free_tokens > 0
    estimate = prior.estimate(Mix(512).work)
    assert 0.3 < estimate.error_s / estimate.seconds < 0.6


def test_a_prior_of_a_cpu_is_learned_over() -> None:
    shape = ModelShape(10, 384, 6, 2, 64, 1024, 8192, dtype="float32", weight_bytes=4, kv_bytes=4)
    fit = StepFit(Roofline(shape, cpu(1)).prior())
    assert worst_error(fit.model) < 1.0
    assert worst_error(learn(fit, observations(TRUTH, 500, seed=4))) < 0.05


# Tables


class FakeTables:
    """Prices of its own for the parts of a step; knows no step of 13 tokens."""

    def attention_ms(self, length: int, prefix: int) -> float:
        return 0.001 * (length**2 - prefix**2)

    def predict_prefill_latency(self, batch: int, length: int, prefix: int) -> float:
        return 1.0 * (length - prefix) + self.attention_ms(length, prefix)

    def decode_step_latency(self, batch: int, length: int, output: int) -> float:
        return 1.0 * batch + 0.01 * batch * length

    def mixed_step_breakdown(
        self, tokens: int, batch: int, length: int, output: int, prefix: int = 0
    ) -> tuple[float, float, float, float]:
        if tokens == 13:
            raise RuntimeError("no row for 13")
        products, decodes = 1.0 * (tokens + batch), 0.01 * batch * length
        chunk_ms = self.attention_ms(length, prefix) / math.ceil(length / tokens)
        return products + chunk_ms + decodes, products, chunk_ms, decodes


def install_tables(monkeypatch: pytest.MonkeyPatch, compile_engine: Callable[..., str]) -> None:
    engine = SimpleNamespace(from_spec=lambda spec: FakeTables())
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", SimpleNamespace(AicEngine=engine))
    monkeypatch.setitem(sys.modules, "aiconfigurator_core.sdk", SimpleNamespace(compile_engine=compile_engine))


def test_tables_are_asked_for_the_parts_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    install_tables(monkeypatch, lambda *args, **more: asked.append((*args, more)) or "spec")
    silicon = Silicon("org/name", "h100_sxm", gpus=2)
    assert asked == [("org/name", "h100_sxm", "vllm", {"tp_size": 2, "moe_tp_size": 2})]
    assert silicon.step_s(Mix()) == 0
    for mix, ms in (
        (Mix(512, 1000), 512 + 0.512 * 2512),
        (Mix(0, 0, 8, 100), 8 + 8),
        (Mix(512, 1000, 8, 100), 512 + 8 + 0.512 * 2512 + 8),
    ):
        assert silicon.step_s(mix) == pytest.approx(ms / 1e3 + HOST_S)
    prior = silicon.prior()
    assert prior.seconds(Mix(2048).work) == pytest.approx(silicon.step_s(Mix(2048)), rel=0.2)
    with pytest.raises(SetupError, match="no row for 13"):
        silicon.step_s(Mix(13, 0, 1, 10))


def test_tables_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise AssertionError("heads must be divisible by 3")

    install_tables(monkeypatch, refuse)
    with pytest.raises(SetupError, match=r"org/name on 3 x h100_sxm with vllm: heads must be divisible by 3"):
        Silicon("org/name", "h100_sxm", gpus=3)
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    with pytest.raises(MissingExtra, match=r"penstock\[silicon\]"):
        Silicon("org/name", "h100_sxm")


def test_measured_tables() -> None:
    pytest.importorskip("aiconfigurator_core")
    silicon = Silicon("meta-llama/Meta-Llama-3.1-8B", "h100_sxm")
    for mix in (Mix(2048), Mix(0, 0, 32, 1024), Mix(512, 4096, 32, 2000)):
        expected_s = Roofline(MODELS["Llama-3-8B"], RANKS["H100"]).step_s(mix)
        assert silicon.step_s(mix) == pytest.approx(expected_s, rel=0.2)
    prior = silicon.prior()
    off = sorted(abs(prior.seconds(mix.work) / silicon.step_s(mix) - 1) for mix in typical_mixes())
    assert off[len(off) // 2] < 0.05
    with pytest.raises(SetupError, match="no tables for"):
        Silicon("meta-llama/Meta-Llama-3.1-8B", "h1000")


# Transfers


@pytest.mark.parametrize(("size_mb", "ms"), [(20, 0.54), (146, 1.50), (1130, 8.84), (4500, 31.65)])
def test_mooncakes_transfers(size_mb: float, ms: float) -> None:
    assert MOONCAKE_8X400G.seconds(size_mb * 1e6) * 1e3 == pytest.approx(ms, rel=0.1)


@pytest.mark.parametrize(("block_kib", "gb_per_s"), [(64, 5.2), (128, 10.3), (256, 19.9)])
def test_nixls_operations(block_kib: int, gb_per_s: float) -> None:
    size_bytes = 1000 * block_kib * 1024
    assert size_bytes / NIXL_H100_READ.seconds(size_bytes, descriptors=1000) / 1e9 == pytest.approx(gb_per_s, rel=0.02)


@given(st.floats(1, 1e11), st.floats(0, 1e11), st.integers(1, 10**6), st.integers(0, 10**6))
def test_moving_more_never_takes_less(size: float, more: float, pieces: int, others: int) -> None:
    assert 0 < NIXL_H100_READ.seconds(size, pieces) <= NIXL_H100_READ.seconds(size + more, pieces + others)


def test_a_link_that_is_slower_than_its_data_sheet_is_learned() -> None:
    prior = over(start_s=20e-6, descriptor_s=1e-6, bytes_per_s=50e9)
    truth = over(start_s=50e-6, descriptor_s=2e-6, bytes_per_s=30e9)
    fit, rng = TransferFit(prior), Random(1)
    before = fit.model.estimate(1e9)
    for _ in range(300):
        size, pieces = 10 ** rng.uniform(4, 10), rng.randint(1, 2000)
        fit.observe(size, pieces, truth.seconds(size, pieces) * math.exp(rng.gauss(0, 0.05)))
    for size, pieces in ((1e5, 1), (1e7, 500), (1e9, 1)):
        assert fit.model.seconds(size, pieces) == pytest.approx(truth.seconds(size, pieces), rel=0.05)
    assert before.error_s > 0.3 * before.seconds > 10 * fit.model.estimate(1e9).error_s


def test_what_came_out_free_can_still_be_learned() -> None:
    prior = prior_of(lambda mix: 0.01 + 1e-4 * (mix.tokens + mix.sequences), doubt=0.5)
    assert min(prior.line.prices) == 0
    assert worst_error(learn(StepFit(prior), observations(TRUTH, 1500, seed=1))) < 0.1
    assert UNKNOWN.free_tokens == 0
