"""Tiny checkpoints with random weights, made on the spot, of architectures that the engine serves.

Weights are drawn wide (standard deviation 0.3) and embeddings are untied, so that a change of one cached block shows
in the output; with the usual narrow ones every model would repeat its last token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

VOCABULARY = 320
WINDOW = 24

_TEXT = """A penstock brings water to the turbine; this one brings prompts to accelerators. Prefill and decode run on
separate workers, and the cache of keys and values stays where it is. What is the capital of France? Paris is."""
_CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_HYBRID = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {  # head_dim is that of the rotation here
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_ROUTED = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
_NO_GROUPS = {"head_dim": None, "num_key_value_heads": None}
_SERVED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "mistral": {"sliding_window": WINDOW},
    "mixtral": _EXPERTS,
    "gemma2": _HYBRID | {"attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "gemma3_text": _HYBRID | {"query_pre_attn_scalar": 16},
    "gpt_oss": _HYBRID | _EXPERTS,
    "deepseek_v2": _LATENT | _EXPERTS | _ROUTED,
    "deepseek_v3": _LATENT | _EXPERTS | _ROUTED,
    "phi3": {},
    "glm4": {},
    "glm4_moe": _EXPERTS | _ROUTED,
    "olmo2": {"initializer_range": 1.0},
    "granite": {},
    "cohere2": _HYBRID,
    "starcoder2": {"sliding_window": WINDOW},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "gpt2": _NO_GROUPS,
}
_ALIKE: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "afmoe": _EXPERTS | _HYBRID,
    "cohere": {},
    "ernie4_5": {},
    "ernie4_5_moe": _EXPERTS,
    "exaone4": _HYBRID,
    "gemma": {},
    "glm": {},
    "glm4_moe_lite": _LATENT | _EXPERTS | _ROUTED,
    "gpt_neox": _NO_GROUPS,
    "granitemoe": _EXPERTS,
    "helium": {},
    "hunyuan_v1_dense": {},
    "longcat_flash": _LATENT
    | {"num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32}
    | {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2},
    "minicpm3": _LATENT,
    "minimax_m2": _EXPERTS,
    "ministral3": {},
    "nanochat": {},
    "olmo": {},
    "olmo3": _HYBRID,
    "olmoe": _EXPERTS,
    "opt": _NO_GROUPS | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": {},
    "phimoe": _EXPERTS,
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 32},
    "seed_oss": {},
    "vaultgemma": _HYBRID,
    "youtu": _LATENT,
}
SERVED = tuple(_SERVED)  # through whole clusters
ALIKE = tuple(_ALIKE)  # by the engine alone: what is cached, and how it is attended to, is like that of one in SERVED
WINDOWED = tuple(name for name, own in _SERVED.items() if "sliding_window" in own)
_OWN = _SERVED | _ALIKE


def tiny_config(architecture: str) -> PreTrainedConfig:
    """The configuration of a model of about 0.2 M parameters. Raises KeyError for an architecture not listed here."""
    return AutoConfig.for_model(architecture, **(_COMMON | _OWN[architecture]))


def make_model(folder: Path, architecture: str = "llama") -> Path:
    """Writes configuration, weights and tokenizer with a chat template to `folder`, equal in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):  # transformers leaves them uninitialised
                torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(_SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    end = _SPECIAL[0]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)
    fast.chat_template = _CHAT
    return fast
