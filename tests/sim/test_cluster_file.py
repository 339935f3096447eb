"""Files of simulated clusters: what they describe, and where they say that a mistake is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from penstock.errors import SetupError
from penstock.policy.latency.device import RANKS, cpu
from penstock.policy.latency.roofline import Roofline
from penstock.policy.latency.shape import MODELS
from penstock.policy.latency.steps import UNKNOWN, StepModel, chunk
from penstock.sim import cluster_file
from penstock.sim.cluster import ClusterSpec, kv_room_bytes, layout_of
from penstock.sim.cluster_file import default, read

EXAMPLES = Path(__file__).parents[2] / "examples/clusters"
BASE = "topology: hgx-h100\nmodel: llama-3-8b\nworkers:\n- {role: any, count: 2}\n"


def load(folder: Path, text: str) -> ClusterSpec:
    path = folder / "lab.yaml"
    path.write_text(text, encoding="utf-8")
    return read(path)


# Layouts and room


@pytest.mark.parametrize(
    ("model", "token_bytes"),
    [
        ("Llama-3-8B", 131_072),
        ("Llama-3-70B", 327_680),
        ("Llama-3.1-405B", 516_096),
        ("Qwen3-32B", 262_144),
        ("Qwen3-8B", 147_456),
        ("Qwen3-30B-A3B", 98_304),
        ("gpt-oss-120b", 73_728),
        ("DeepSeek-V3", 70_272),
    ],
)
def test_bytes_of_a_token(model: str, token_bytes: int) -> None:
    assert layout_of(MODELS[model], 512).token_bytes == token_bytes == MODELS[model].kv_token_bytes


def test_room_is_what_the_weights_leave_and_copies_take_their_part() -> None:
    gib = 1 << 30
    dense, latent = MODELS["Llama-3-70B"], MODELS["DeepSeek-V3"]
    assert dense.weights_bytes == pytest.approx(141e9, rel=0.01)
    assert latent.weights_bytes == pytest.approx(671e9, rel=0.01)
    assert MODELS["gpt-oss-120b"].weights_bytes == pytest.approx(64e9, rel=0.03)
    assert kv_room_bytes(dense, 80 * gib, 4) == 4 * (72 * gib - 2 * gib) - dense.weights_bytes
    assert kv_room_bytes(dense, 80 * gib, 16) == (16 * 70 * gib - dense.weights_bytes) / 2  # 8 heads on 16 GPUs
    assert kv_room_bytes(latent, 141 * gib, 8) == pytest.approx((8 * 124.9 * gib - latent.weights_bytes) / 8)
    assert kv_room_bytes(dense, 80 * gib, 1) < 0


# What files describe


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_load(path: Path) -> None:
    cluster = read(path)
    assert cluster.name == path.stem
    assert {worker.role for worker in cluster.workers} == {"prefill", "decode"}
    assert all(device in cluster.fabric.vertices for worker in cluster.workers for device in worker.devices)


def test_a_large_one() -> None:
    cluster = read(EXAMPLES / "h100-70b-disagg.yaml")
    assert (cluster.gpus, cluster.model, cluster.layout.block_tokens) == (64, "Llama-3-70B", 512)
    first, second = cluster.workers[:2]
    assert (first.name, first.devices[0], first.step_tokens) == ("prefill-0", "node0/gpu0", 8192)
    assert (second.name, second.devices[0], second.step_tokens) == ("decode-0", "node0/gpu4", 2048)
    assert first.step_model == Roofline(MODELS["Llama-3-70B"], RANKS["H100"], 4).prior()
    room_bytes = kv_room_bytes(MODELS["Llama-3-70B"], RANKS["H100"].sheet.memory_bytes, 4)
    assert first.kv_blocks == room_bytes // cluster.layout.block_bytes
    assert cluster.max_context_tokens == 131_072


def test_the_default_is_small_and_has_both_roles() -> None:
    cluster = default()
    assert [worker.name for worker in cluster.workers][:3] == ["prefill-0", "decode-0", "prefill-1"]
    assert (cluster.gpus, cluster.message_s, cluster.in_place) == (8, 50e-6, False)


def test_all_settings(tmp_path: Path) -> None:
    (tmp_path / "net.yaml").write_text(
        "fat_tree: {holds: {preset: hgx-h200, count: 2}, tiers: [{kind: rack, count: 2}]}"
    )
    cluster = load(
        tmp_path,
        """
name: all of it
topology: net.yaml
model: Qwen3-32B
dtype: fp8
block_tokens: 64
max_context_tokens: 40000
latency: {prices: [2e-3, 0.00001, 1e-10, 2.5e-6, 3e-10], free_tokens: 64}
placement: packed
message: 20 us
report: 1 s
max_queued: 9
in_place: true
workers:
- {role: any, count: 2, gpus: 2, on: [rack1], kv_gib: 10, step_tokens: 100, max_running: 7}
""",
    )
    worker = cluster.workers[1]
    assert (worker.name, worker.devices) == ("any-1", ("rack1/node0/gpu2", "rack1/node0/gpu3"))
    assert (worker.step_tokens, worker.max_running, worker.kv_blocks) == (100, 7, 10 * 2**30 // (64 * 262_144))
    assert worker.step_model.seconds(chunk(64)) == pytest.approx(2e-3 + 1e-10 * 64 * 65 / 2)
    assert (cluster.name, cluster.message_s, cluster.report_s, cluster.max_queued) == (
        "all of it",
        pytest.approx(20e-6),
        1.0,
        9,
    )
    assert (cluster.in_place, cluster.placement, cluster.max_context_tokens) == (True, "packed", 40_000)


def test_a_topology_inside_the_file(tmp_path: Path) -> None:
    for topology in ("{preset: hgx-h100, count: 3}", "{holds: [{preset: hgx-h100, count: 3}]}"):
        cluster = load(tmp_path, BASE.replace("hgx-h100", topology))
        assert len(cluster.fabric.devices) == 3 * (8 + 2)


def test_cpu_workers_and_a_config(tmp_path: Path) -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128, "dtype": "float32"}))
    text = "topology: tcp-host\nmodel: {}\nblock_tokens: 16\nworkers:\n- {{role: any, cores: 2, kv_gib: 0.01}}\n"
    for model in ("tiny", "tiny/config.json"):
        cluster = load(tmp_path, text.format(model))
        (worker,) = cluster.workers
        assert (cluster.model, worker.devices, cluster.layout.dtype) == ("tiny", ("node0/cpu0",), "float32")
        shape_s = worker.step_model.seconds(chunk(64))
        assert cpu(2).host_s < shape_s < 0.1


def test_without_nvlink_all_reduce_is_as_slow_as_the_links(tmp_path: Path) -> None:
    text = "topology: {preset: hgx-h100%s}\nmodel: llama-3-8b\nworkers:\n- {role: any, gpus: 8}\n"
    quick, slow = (load(tmp_path, text % more).workers[0].step_model for more in ("", ", nvlink: none"))
    assert slow.seconds(chunk(8192)) > 1.5 * quick.seconds(chunk(8192))


# Splits


def test_another_split_deals_the_same_devices() -> None:
    cluster = read(EXAMPLES / "h100-70b-disagg.yaml")
    split = cluster.with_split(4, 12)
    assert [worker.devices for worker in split.workers] == [worker.devices for worker in cluster.workers]
    assert [worker.role for worker in split.workers].count("prefill") == 4
    assert {worker.step_tokens for worker in split.workers if worker.role == "decode"} == {2048}
    assert sorted({worker.name for worker in split.workers})[-1] == "prefill-3"
    assert split.with_split(8, 8).workers == cluster.workers


def test_splits_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="split 8:9 is not the 16 workers of h100-70b-disagg"):
        read(EXAMPLES / "h100-70b-disagg.yaml").with_split(8, 9)
    uneven = load(tmp_path, BASE.replace("count: 2}", "gpus: 2}\n- {role: decode}"))
    with pytest.raises(SetupError, match="workers of lab have 1 or 2 GPUs, so roles cannot change places"):
        uneven.with_split(1, 1)


# Mistakes: what replaces what in BASE; line, field, and a part of what is said

MISTAKES: list[tuple[str, str, int, str, str]] = [
    ("model:", "modle:", 2, "modle", "did you mean 'model'?"),
    ("model: llama-3-8b\n", "", 1, "", "needs `model`"),
    ("llama-3-8b", "llama-3-9b", 2, "model", "did you mean 'llama-3-8b'?"),
    ("hgx-h100", "hgx-h10", 1, "topology", "did you mean 'hgx-h100'?"),
    ("hgx-h100", "{preset: hgx-h100, cuont: 2}", 1, "topology.cuont", "did you mean 'count'?"),
    ("role: any", "role: prefil", 4, "workers[0].role", "did you mean 'prefill'?"),
    ("role: any, ", "", 4, "workers[0]", "needs `role`"),
    ("count: 2", "cuont: 2", 4, "workers[0].cuont", "did you mean 'count'?"),
    ("count: 2", "count: 0", 4, "workers[0].count", "0 is not between 1"),
    ("count: 2", "count: 9", 4, "workers", "any worker 9 of 9"),
    ("count: 2", "gpus: 9", 4, "workers", "need 9 GPUs of one node, the largest has 8"),
    ("count: 2", "gpus: 1, cores: 2", 4, "workers[0].cores", "is instead of `gpus`"),
    ("count: 2", "cores: 2", 4, "workers[0]", "needs `kv_gib`"),
    ("count: 2", "kv_gib: 100", 4, "workers[0]", "kv_gib: beside the weights there is room for 55.0 GiB"),
    ("count: 2", "kv_gib: 0.01", 4, "workers[0]", "kv_gib: 512 tokens take 0.0625 GiB"),
    ("count: 2", "kv_gib: many", 4, "workers[0].kv_gib", "needs a number of at least 0"),
    ("count: 2", "on: [node7]", 4, "workers[0].on[0]", "did you mean 'node0'?"),
    ("llama-3-8b", "llama-3-70b", 4, "workers[0]", "leave no room for KV on 1 x h100_sxm of 80 GiB: raise `gpus`"),
    ("workers:\n- {role: any, count: 2}", "workers: []", 3, "workers", "needs at least one group"),
    ("model: llama-3-8b", "model: llama-3-8b\nlatency: fast", 3, "latency", "is `roofline`, or has one of"),
    ("model: llama-3-8b", "model: llama-3-8b\nlatency: {}", 3, "latency", "needs `silicon` or `prices`"),
    ("model: llama-3-8b", "model: llama-3-8b\nlatency: {prices: [1]}", 3, "latency.prices", "has 1 prices"),
    ("model: llama-3-8b", "model: llama-3-8b\nlatency: {silicon: {}}", 3, "latency.silicon", "needs `model`"),
    ("model: llama-3-8b", "model: llama-3-8b\nplacement: tight", 3, "placement", "there is interleaved, packed"),
    ("model: llama-3-8b", "model: llama-3-8b\nmessage: 50", 3, "message", "such as 3 us"),
    ("model: llama-3-8b", "model: llama-3-8b\ndtype: fp7", 3, "dtype", "did you mean 'fp8'?"),
    ("model: llama-3-8b", "model: llama-3-8b\nmax_context_tokens: 9000000", 3, "max_context_tokens", "more than the"),
    ("hgx-h100", "{preset: tcp-host, gpus: 8, gpu: {memory: 80 GiB}}", 4, "workers[0]", "does not say how fast gpu is"),
]


@pytest.mark.parametrize(("old", "new", "line", "field", "said"), MISTAKES)
def test_a_mistake_is_told_with_line_and_field(
    tmp_path: Path, old: str, new: str, line: int, field: str, said: str
) -> None:
    where = f"{tmp_path / 'lab.yaml'}:{line}: {field + ': ' if field else ''}"
    with pytest.raises(SetupError, match=f"^{re.escape(where)}.*{re.escape(said)}"):
        load(tmp_path, BASE.replace(old, new))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"cannot read .*nowhere\.yaml"):
        read(tmp_path / "nowhere.yaml")
    with pytest.raises(SetupError, match="the file is empty; write `topology:`, `model:` and `workers:`"):
        load(tmp_path, "")
    with pytest.raises(SetupError, match=r"cannot read .*net\.yaml"):
        load(tmp_path, BASE.replace("hgx-h100", "net.yaml"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SetupError, match=r"lab\.yaml:2: model: .*config.json: "):
        load(tmp_path, BASE.replace("llama-3-8b", "config.json"))


def test_silicon_is_asked_for_the_device_unless_the_file_names_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, str, int]] = []

    class Tables:
        def __init__(self, *who: str | int) -> None:
            asked.append(who)  # type: ignore[arg-type]

        def prior(self, expert_share: float) -> StepModel:
            return UNKNOWN

    monkeypatch.setattr(cluster_file, "Silicon", Tables)
    for more in ("", ", system: b200_sxm, engine: sglang"):
        latency = f"latency: {{silicon: {{model: org/name{more}}}}}\n"
        assert load(tmp_path, latency + BASE).workers[1].step_model == UNKNOWN
    assert asked == [("org/name", "h100_sxm", "vllm", 1), ("org/name", "b200_sxm", "sglang", 1)]
