"""Before the first step: what is known of a model, and what is refused, in one line that says what to do."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from penstock.blocks import KvLayout
from penstock.engine import embedded, embedded_attention
from penstock.engine.embedded import EmbeddedEngine, Options
from penstock.engine.embedded_attention import Scoring
from penstock.errors import MissingExtra, SetupError, UnreadableModel, UnsupportedModel
from tests.models import ALIKE, SERVED, make_model
from tests.support import run

Checkpoint = Callable[[str], Path]


def enter(folder: Path, dtype: str = "float32") -> None:
    async def inside() -> None:
        async with EmbeddedEngine(Options(str(folder), device="cpu", dtype=dtype, threads=1)):
            pass

    run(inside())


def test_what_is_known_before_the_weights_are_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("qwen3")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    info = EmbeddedEngine(Options(str(tmp_path), device="cpu", dtype="bfloat16", block_tokens=32)).info
    assert info.layout == KvLayout(layers=4, kv_heads=2, head_dim=16, block_tokens=32, dtype="bfloat16")
    assert (info.name, info.model, info.vocab_size, info.max_context_tokens) == ("embedded", str(tmp_path), 320, 512)
    assert info.eos_token_ids == (3, 5)
    assert (info.device, info.shares_memory) == ("cpu", True)


def test_of_a_latent_one_row_per_token_is_cached(checkpoint: Checkpoint) -> None:
    layout = EmbeddedEngine(Options(str(checkpoint("deepseek_v3")), device="cpu")).info.layout
    assert layout == KvLayout(layers=4, kv_heads=1, head_dim=24 + 8, block_tokens=16, dtype="float32", sides=1)
    assert layout.token_bytes == 4 * (24 + 8) * 4


def test_the_cpu_computes_in_float32_unless_told(checkpoint: Checkpoint) -> None:
    assert EmbeddedEngine(Options(str(checkpoint("llama")), device="cpu")).info.layout.dtype == "float32"


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("deepseek_v32", "DeepseekV32ForCausalLM has layers of type indexed_attention"),
        ("llama4_text", "Llama4ForCausalLM has layers of type chunked_attention"),
        ("qwen3_next", "Qwen3NextForCausalLM keeps a state"),
        ("mamba", "MambaForCausalLM keeps a state"),
        ("rwkv", "RwkvForCausalLM keeps a state"),
        ("jamba", "JambaForCausalLM keeps a state"),
        ("kimi_linear", "KimiLinearForCausalLM keeps a state"),
        ("minimax", "MiniMaxForCausalLM has layers of type linear_attention"),
        ("mimo_v2_flash", "MiMoV2FlashForCausalLM caches values of another width than keys"),
        ("bloom", "BloomForCausalLM does not use AttentionInterface"),
        ("gemma3n_text", "Gemma3nForCausalLM shares keys and values between layers"),
        ("gemma4_text", "Gemma4ForCausalLM has layers of different shapes"),
        ("bart", "BartForCausalLM is no decoder"),
        ("t5", "T5Config is no decoder"),
    ],
)
def test_other_caches_are_refused(tmp_path: Path, architecture: str, reason: str) -> None:
    AutoConfig.for_model(architecture).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=f"{reason}.*; served are .*Llama"):
        EmbeddedEngine(Options(str(tmp_path), device="cpu"))


def test_what_is_tested_is_listed() -> None:
    listed = (Path(__file__).parents[3] / "docs/engine.md").read_text()
    names = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture] for architecture in SERVED + ALIKE]
    assert [name for name in names if f"`{name}`" not in listed] == []


def test_encoders_are_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("bert", architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="BertForMaskedLM is no decoder"):
        EmbeddedEngine(Options(str(tmp_path), device="cpu"))


@pytest.mark.parametrize(
    ("architecture", "dtype", "scoring"),
    [
        ("llama", "float32", lambda scaling, softcap, sinks: Scoring(1.01 * scaling, softcap, sinks)),
        ("llama", "bfloat16", lambda scaling, softcap, sinks: Scoring(4 * scaling, softcap, sinks)),
        ("gemma2", "float32", lambda scaling, softcap, sinks: Scoring(scaling, None, sinks)),
        ("gpt_oss", "float32", lambda scaling, softcap, sinks: Scoring(scaling, softcap, None)),
    ],
    ids=["scaling", "scaling coarsely", "softcap", "sinks"],
)
def test_attention_that_is_not_the_models_own_is_refused(
    checkpoint: Checkpoint,
    architecture: str,
    dtype: str,
    scoring: Callable[..., Scoring],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoint(architecture)
    enter(folder, dtype)
    monkeypatch.setattr(embedded_attention, "Scoring", scoring)
    with pytest.raises(UnsupportedModel, match=r"ForCausalLM does not attend as this engine does"):
        enter(folder, dtype)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("bert", "BertLMHeadModel failed a trial step: .* in both directions"),
        ("diffllama", "DiffLlamaForCausalLM failed a trial step: .* changes keys and values after they were cached"),
        ("nemotron", "NemotronForCausalLM failed a trial step: .* is not handed what its model was called with"),
    ],
)
def test_what_the_configuration_hides_shows_in_a_trial_step(tmp_path: Path, architecture: str, reason: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model(architecture, vocab_size=50, num_key_value_heads=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=reason):
        enter(tmp_path)


@pytest.mark.parametrize(
    ("content", "error", "complaint"),
    [
        (None, UnreadableModel, "is no model folder: it has no config.json"),
        ("{", UnreadableModel, "not a valid JSON file"),
        ("{}", UnsupportedModel, "Should have a `model_type`"),
        ('{"model_type": "frobnicate"}', UnsupportedModel, "frobnicate"),
    ],
)
def test_a_folder_without_a_model_is_refused(
    tmp_path: Path, content: str | None, error: type[SetupError], complaint: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=complaint) as refused:
        EmbeddedEngine(Options(str(tmp_path), device="cpu"))
    assert "\n" not in str(refused.value)


def drop(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights.items() if name != "lm_head.weight"}


def cut(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {"lm_head.weight": torch.zeros(1, 1)}


@pytest.mark.parametrize(("damage", "complaint"), [(drop, "such as lm_head.weight"), (cut, "cannot be read")])
def test_missing_or_misshapen_weights_are_refused(
    tmp_path: Path, damage: Callable[[dict[str, Any]], dict[str, Any]], complaint: str
) -> None:
    path = make_model(tmp_path) / "model.safetensors"
    save_file(damage(load_file(path)), path, metadata={"format": "pt"})
    with pytest.raises(UnreadableModel, match=complaint):
        enter(tmp_path)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    (make_model(tmp_path) / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UnreadableModel, match=r"the weights of .* cannot be read"):
        enter(tmp_path)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is unknown; give"),
        ({"device": "toaster"}, "device 'toaster' cannot be used"),
        ({"max_context_tokens": 513}, "max_context_tokens 513 is over the 512"),
    ],
)
def test_impossible_settings_are_refused(checkpoint: Checkpoint, setting: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SetupError, match=complaint):
        EmbeddedEngine(Options(**({"model": str(checkpoint("llama")), "device": "cpu"} | setting)))


def test_the_context_limit_can_be_lowered(checkpoint: Checkpoint) -> None:
    options = Options(str(checkpoint("llama")), device="cpu", max_context_tokens=100)
    assert EmbeddedEngine(options).info.max_context_tokens == 100


def test_rotations_that_depend_on_the_longest_context_are_limited_to_where_they_do_not(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "phi3")
    config = json.loads((folder / "config.json").read_text())
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config["rope_parameters"] |= {"rope_type": "longrope"} | factors
    config["original_max_position_embeddings"] = 128
    (folder / "config.json").write_text(json.dumps(config))
    assert EmbeddedEngine(Options(str(folder), device="cpu")).info.max_context_tokens == 128


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=r"needs torch: pip install 'penstock\[torch\]'"):
        EmbeddedEngine(Options("anywhere"))


def test_the_module_is_found_without_torch() -> None:
    code = "import sys, penstock.engine.embedded; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert embedded.ENGINE is EmbeddedEngine


def test_models_are_loaded_one_at_a_time(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """from_pretrained patches classes while it runs; overlapping loads would leave weights untied ever after."""
    folder, loading, most = checkpoint("llama"), 0, 0
    real = AutoModelForCausalLM.from_pretrained

    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal loading, most
        loading += 1
        most = max(most, loading)
        try:
            return real(*arguments, **options)
        finally:
            loading -= 1

    async def load() -> None:
        async with EmbeddedEngine(Options(str(folder), device="cpu", threads=1)):
            pass

    async def story() -> None:
        await asyncio.gather(*(load() for _ in range(6)))

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    run(story())
    assert most == 1
