"""What engines say about their load."""

from __future__ import annotations

import pytest

from penstock.serve.engine_metrics import read_metrics

VLLM = """
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
# TYPE vllm:request_prompt_tokens histogram
vllm:request_prompt_tokens_sum{engine="0",model_name="m"} 3000.0
vllm:request_prompt_tokens_count{engine="0",model_name="m"} 10.0
vllm:request_prefill_kv_computed_tokens_sum{engine="0"} 2000.0
vllm:request_prefill_time_seconds_sum{engine="0"} 0.5
vllm:inter_token_latency_seconds_sum{engine="0"} 2.0
vllm:inter_token_latency_seconds_count{engine="0"} 100.0
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{engine="0"} 3000.0
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="800"} 1.0
"""
SGLANG = """
sglang:num_running_reqs{model_name="m"} 5.0
sglang:num_queue_reqs{model_name="m"} 1.0
sglang:token_usage{model_name="m"} 0.5
sglang:max_total_num_tokens{model_name="m"} 10000.0
"""


def test_vllm() -> None:
    reading = read_metrics(VLLM, 0, 1.0)
    assert reading is not None
    load = reading.load
    assert (reading.blocks, reading.block_tokens) == (800, 16)
    assert (load.running, load.waiting, load.queued_tokens) == (3, 2, 600)
    assert (load.blocks, load.free_blocks) == (800, 600)
    assert (load.prefill_tokens_per_s, load.decode_step_s) == (4000.0, 0.02)
    assert load.prompt_tokens == 3000


def test_a_server_of_several_engines_is_their_sum_unless_one_is_meant() -> None:
    whole, other = read_metrics(VLLM, None, 1.0), read_metrics(VLLM, 1, 1.0)
    assert whole is not None
    assert other is not None
    assert (whole.load.running, other.load.running) == (7, 4)


def test_sglang() -> None:
    reading = read_metrics(SGLANG, None, 1.0)
    assert reading is not None
    assert (reading.load.running, reading.load.waiting) == (5, 1)
    assert (reading.load.blocks, reading.load.free_blocks) == (10000, 5000)


def test_other_servers_say_nothing() -> None:
    assert read_metrics("process_cpu_seconds_total 3\n", None, 1.0) is None
    with pytest.raises(ValueError):
        read_metrics("<html>", None, 1.0)
