"""What vLLM and SGLang say about their load under /metrics, as penstock's own words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from penstock.cluster import Load

_VLLM, _SGLANG = "vllm:", "sglang:"


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at an engine. Its cache's size is 0 where it does not say."""

    load: Load
    blocks: int = 0
    block_tokens: int = 0


def read_metrics(page: str, rank: int | None, at_s: float) -> Reading | None:
    """The engine's load; None for a page of another kind of server. `rank`: of one data-parallel engine of several.

    Raises ValueError for what is no page of metrics.
    """
    values: dict[str, float] = defaultdict(float)
    labels: dict[str, Mapping[str, str]] = {}
    for family in text_string_to_metric_families(page):
        if not family.name.startswith((_VLLM, _SGLANG)):
            continue
        for sample in family.samples:
            if rank is None or sample.labels.get("engine", sample.labels.get("dp_rank", str(rank))) == str(rank):
                values[sample.name] += sample.value
                labels[sample.name] = sample.labels
    if _VLLM + "num_requests_running" in values:
        return _read_vllm(values, labels.get(_VLLM + "cache_config_info", {}), at_s)
    if _SGLANG + "num_running_reqs" in values:
        return _read_sglang(values, at_s)
    return None


def _read_vllm(values: Mapping[str, float], cache: Mapping[str, str], at_s: float) -> Reading:
    get = {name.removeprefix(_VLLM): value for name, value in values.items()}.get
    blocks, block_tokens = _whole(cache.get("num_gpu_blocks")), _whole(cache.get("block_size"))
    waiting = int(get("num_requests_waiting", 0.0))
    load = Load(
        at_s=at_s,
        waiting=waiting,
        running=int(get("num_requests_running", 0.0)),
        queued_tokens=int(waiting * _ratio(get("request_prompt_tokens_sum"), get("request_prompt_tokens_count"))),
        blocks=blocks,
        free_blocks=blocks - int(blocks * min(1.0, get("kv_cache_usage_perc", 0.0))),
        prefill_tokens_per_s=_ratio(
            get("request_prefill_kv_computed_tokens_sum"), get("request_prefill_time_seconds_sum")
        ),
        decode_step_s=_ratio(get("inter_token_latency_seconds_sum"), get("inter_token_latency_seconds_count")),
        computed_tokens=int(get("request_prefill_kv_computed_tokens_sum", 0.0)),
        prefills=int(get("request_prefill_kv_computed_tokens_count", 0.0)),
        prompt_tokens=int(get("prefix_cache_queries_total", 0.0)),
        cached_tokens=int(get("prefix_cache_hits_total", 0.0)),
        output_tokens=int(get("generation_tokens_total", 0.0)),
        preemptions=int(get("num_preemptions_total", 0.0)),
    )
    return Reading(load, blocks, block_tokens)


def _read_sglang(values: Mapping[str, float], at_s: float) -> Reading:
    get = {name.removeprefix(_SGLANG): value for name, value in values.items()}.get
    tokens = int(get("max_total_num_tokens", 0.0))  # its pages can be one token large; here they are counted so
    waiting = int(get("num_queue_reqs", 0.0))
    prompt_tokens = get("prompt_tokens_total", 0.0)
    load = Load(
        at_s=at_s,
        waiting=waiting,
        running=int(get("num_running_reqs", 0.0)),
        queued_tokens=int(waiting * _ratio(prompt_tokens, get("num_requests_total"))),
        blocks=tokens,
        free_blocks=tokens - int(tokens * min(1.0, get("token_usage", 0.0))),
        decode_step_s=_ratio(get("inter_token_latency_seconds_sum"), get("inter_token_latency_seconds_count")),
        prompt_tokens=int(prompt_tokens),
        cached_tokens=int(get("cached_tokens_total", 0.0)),
        output_tokens=int(get("generation_tokens_total", 0.0)),
    )
    return Reading(load, tokens, 1)


def _ratio(part: float | None, whole: float | None) -> float:
    return part / whole if part and whole else 0.0


def _whole(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0
