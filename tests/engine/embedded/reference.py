"""Sampling as vLLM documents it, one row and one token at a time, in float64 and plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf

from penstock.engine.chance import uniform
from penstock.request import Sampling


def changed(
    logits: Sequence[float], sampling: Sampling, prompt: Sequence[int], output: Sequence[int], eos: Sequence[int]
) -> list[float]:
    """What greedy chooses the largest of: the logits after everything that is not for random draws alone."""
    values = list(logits)
    for word in sampling.bad_words:
        head = list(word[:-1])
        if not head or list(output[-len(head) :]) == head:
            values[word[-1]] = -inf
    if len(output) < sampling.min_tokens:
        for token in [*sampling.stop_token_ids, *([] if sampling.ignore_eos else eos)]:
            values[token] = -inf
    for token, bias in sampling.logit_bias:
        values[token] += bias
    for token in range(len(values)):
        if token in prompt or token in output:
            if values[token] > 0:
                values[token] /= sampling.repetition_penalty
            else:
                values[token] *= sampling.repetition_penalty
        times = list(output).count(token)
        values[token] -= times * sampling.frequency_penalty
        if times:
            values[token] -= sampling.presence_penalty
    return values if max(values) > -inf else list(logits)


def chances(logits: Sequence[float], sampling: Sampling) -> dict[int, float]:
    """By token, what a draw from the changed logits gives; greedy is certain of one."""
    likeliest = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if sampling.temperature == 0:
        return {likeliest[0]: 1.0}
    best = logits[likeliest[0]]
    weights = {token: exp((logits[token] - best) / sampling.temperature) for token in likeliest}
    weights = {token: weight for token, weight in weights.items() if weight >= sampling.min_p}
    if sampling.top_k:
        weights = {token: weights[token] for token in list(weights)[: sampling.top_k]}
    total, before, kept = sum(weights.values()), 0.0, {}
    for token, weight in weights.items():
        if before < sampling.top_p:
            kept[token] = weight
        before += weight / total
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


def choose(
    logits: Sequence[float], sampling: Sampling, prompt: Sequence[int], output: Sequence[int], eos: Sequence[int]
) -> int:
    """The token: the distribution function, by id, inverted at the uniform of its position."""
    parts = chances(changed(logits, sampling, prompt, output, eos), sampling)
    target, reached = uniform(sampling.seed, sampling.choice, len(prompt) + len(output)), 0.0
    for token in sorted(parts):
        reached += parts[token]
        if reached > target:
            return token
    return max(parts)
