"""The size of a model, from its Hugging Face config.json: parameters, bytes of KV per token, work per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from penstock.errors import UnsupportedModel

_DTYPE_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
_QUANTIZED_BYTES = {"fp8": 1.0, "mxfp4": 4.25 / 8}  # mxfp4: 4 bits each, and 8 for every 32 of them
_FULL = "full_attention"
_ATTENTION = {_FULL, "sliding_attention"}
_FOREIGN = ("mamba", "ssm_", "linear_", "interleave_moe")  # fields of models that are put together otherwise


class Latents(msgspec.Struct, frozen=True):
    """Multi-head latent attention (DeepSeek): keys and values are one latent per token, and a rotary part."""

    query_rank: int  # 0: queries come straight from the hidden state
    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int


class Experts(msgspec.Struct, frozen=True):
    """A mixture: each token uses `active` of `count` experts, and the shared ones always.

    `ffn` is the width of one expert, `shared_ffn` of all shared ones together; `layers` have it, the others are dense.
    """

    count: int
    active: int
    ffn: int
    layers: int
    shared_ffn: int = 0


class ModelShape(msgspec.Struct, frozen=True):
    """A decoder of transformers. Norms, biases and sinks are left out: they are under 0.1 % of it.

    `window` tokens are all that `windowed_layers` look back. `dtype` is what products are computed in, and
    `weight_bytes`, `expert_bytes` and `kv_bytes` are what one element of weights, experts and KV takes.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    experts: Experts | None = None
    latents: Latents | None = None
    window: int = 0
    windowed_layers: int = 0
    is_tied: bool = False
    dtype: str = "bfloat16"
    weight_bytes: float = 2.0
    expert_bytes: float = 2.0
    kv_bytes: float = 2.0

    @property
    def kv_layer_bytes(self) -> float:
        """KV of one token in one layer: keys and values of each head, or the latent."""
        elements = 2 * self.kv_heads * self.head_dim
        if self.latents is not None:
            elements = self.latents.kv_rank + self.latents.rope_dim
        return elements * self.kv_bytes

    @property
    def kv_token_bytes(self) -> float:
        """KV of one token in all layers, as it is computed and moved."""
        return self.layers * self.kv_layer_bytes

    def kv_held_bytes(self, tokens: int) -> float:
        """KV of a context of `tokens`, of which windowed layers keep only their window."""
        kept = (self.layers - self.windowed_layers) * tokens + self.windowed_layers * min(tokens, self.window)
        return kept * self.kv_layer_bytes

    def kv_copies(self, gpus: int) -> float:
        """How many times `gpus` together hold and read KV: each has it all if it is a latent, or has too few heads."""
        return max(1.0, gpus / (1 if self.latents else self.kv_heads))

    @property
    def attention_parameters(self) -> int:
        """Of the projections in one layer."""
        if (mla := self.latents) is None:
            return 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        key_dim = mla.nope_dim + mla.rope_dim
        queries = self.heads * key_dim
        query = mla.query_rank * (self.hidden + queries) if mla.query_rank else self.hidden * queries
        keys_values = self.hidden * (mla.kv_rank + mla.rope_dim)
        keys_values += mla.kv_rank * self.heads * (mla.nope_dim + mla.value_dim)
        return query + keys_values + self.heads * mla.value_dim * self.hidden

    @property
    def dense_parameters(self) -> int:
        """Of all layers, read in every step: attention, dense FFNs (gate, up, down), shared experts and gates."""
        mixed = self.experts.layers if self.experts else 0
        dense = self.layers * self.attention_parameters + (self.layers - mixed) * 3 * self.hidden * self.ffn
        if self.experts:
            dense += mixed * self.hidden * (3 * self.experts.shared_ffn + self.experts.count)
        return dense

    @property
    def expert_parameters(self) -> int:
        """Of one expert in every layer that has any."""
        return 3 * self.hidden * self.experts.ffn * self.experts.layers if self.experts else 0

    @property
    def head_parameters(self) -> int:
        """Of the output head, used by sampled tokens only."""
        return self.hidden * self.vocab

    @property
    def active_parameters(self) -> int:
        """What a token passes through on its way, without embedding and head."""
        return self.dense_parameters + (self.experts.active * self.expert_parameters if self.experts else 0)

    @property
    def parameters(self) -> int:
        embeddings = self.head_parameters * (1 if self.is_tied else 2)
        return self.dense_parameters + (self.experts.count * self.expert_parameters if self.experts else 0) + embeddings

    @property
    def weights_bytes(self) -> float:
        """Of all weights, held once."""
        experts = self.experts.count * self.expert_parameters if self.experts else 0
        return (self.parameters - experts) * self.weight_bytes + experts * self.expert_bytes

    @property
    def expert_share(self) -> float:
        """The share of the experts that one token uses; 0 without any."""
        return self.experts.active / self.experts.count if self.experts else 0.0


class _Config(msgspec.Struct):
    """The fields of config.json that matter here, by the names that families give them."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    intermediate_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool | None = None
    model_type: str = ""
    torch_dtype: str | None = None
    dtype: str | None = None
    quantization_config: dict[str, Any] | None = None
    # windows
    sliding_window: int | None = None
    use_sliding_window: bool = True
    max_window_layers: int | None = None
    layer_types: list[str] | None = None
    # mixtures: Mixtral and gpt-oss, Qwen, DeepSeek
    num_local_experts: int | None = None
    num_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int = 0
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int = 0
    n_shared_experts: int | None = None
    first_k_dense_replace: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    # latents
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_rope_head_dim: int = 0
    qk_nope_head_dim: int = 0
    v_head_dim: int = 0


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes; of a multimodal one, that of its language model.

    Raises UnsupportedModel for one that lacks what a decoder has, or keeps another state than keys and values.
    """
    text = config.get("text_config", config)
    strange = sorted(
        {key for key in text if key.startswith(_FOREIGN)} | set(text.get("layer_types") or ()) - _ATTENTION
    )
    if strange:
        raise UnsupportedModel(f"the size of a model with {', '.join(strange)} in its config.json is not known")
    try:
        read = msgspec.convert(dict(text), _Config)
    except msgspec.ValidationError as error:
        raise UnsupportedModel(f"config.json does not say the size of a decoder: {error}") from error
    dtype, weight_bytes, expert_bytes = _weights(read)
    return ModelShape(
        layers=read.num_hidden_layers,
        hidden=read.hidden_size,
        heads=read.num_attention_heads,
        kv_heads=read.num_key_value_heads or read.num_attention_heads,
        head_dim=read.head_dim or read.hidden_size // read.num_attention_heads,
        ffn=read.intermediate_size,
        vocab=read.vocab_size,
        experts=_experts(read),
        latents=_latents(read),
        window=read.sliding_window or 0,
        windowed_layers=_windowed_layers(read),
        is_tied=_is_tied(read),
        dtype=dtype,
        weight_bytes=weight_bytes,
        expert_bytes=expert_bytes,
        kv_bytes=4.0 if dtype == "float32" else 2.0,
    )


def _experts(config: _Config) -> Experts | None:
    count = config.n_routed_experts or config.num_experts or config.num_local_experts
    if not count:
        return None
    ffn = config.moe_intermediate_size or config.intermediate_size
    layers = range(config.first_k_dense_replace, config.num_hidden_layers)
    mixed = [layer for layer in layers if (layer + 1) % config.decoder_sparse_step == 0]
    return Experts(
        count=count,
        active=config.num_experts_per_tok,
        ffn=ffn,
        layers=len(set(mixed) - set(config.mlp_only_layers or ())),
        shared_ffn=config.shared_expert_intermediate_size + (config.n_shared_experts or 0) * ffn,
    )


def _latents(config: _Config) -> Latents | None:
    if config.kv_lora_rank is None:
        return None
    return Latents(
        query_rank=config.q_lora_rank or 0,
        kv_rank=config.kv_lora_rank,
        rope_dim=config.qk_rope_head_dim,
        nope_dim=config.qk_nope_head_dim,
        value_dim=config.v_head_dim,
    )


def _windowed_layers(config: _Config) -> int:
    """Qwen windows the layers from `max_window_layers` on, and only if `use_sliding_window`; Mistral all of them."""
    if not config.sliding_window or not config.use_sliding_window:
        return 0
    if config.layer_types is not None:
        return sum(kind != _FULL for kind in config.layer_types)
    return config.num_hidden_layers - (config.max_window_layers or 0)


def _is_tied(config: _Config) -> bool:
    """Gemma ties by default, and says so only if it does not; the others say it if they do."""
    if config.tie_word_embeddings is None:
        return config.model_type.startswith("gemma")
    return config.tie_word_embeddings


def _weights(config: _Config) -> tuple[str, float, float]:
    """The dtype of products (mxfp4 is widened to it), bytes of a weight, and of a weight of an expert."""
    dtype = config.dtype or config.torch_dtype or "bfloat16"
    plain = _DTYPE_BYTES.get(dtype, 2.0)
    match (config.quantization_config or {}).get("quant_method"):
        case "fp8":
            return "fp8", _QUANTIZED_BYTES["fp8"], _QUANTIZED_BYTES["fp8"]
        case "mxfp4":
            return dtype, plain, _QUANTIZED_BYTES["mxfp4"]
    return dtype, plain, plain


def _llama_3(layers: int, hidden: int, heads: int, ffn: int) -> ModelShape:
    return ModelShape(layers, hidden, heads, kv_heads=8, head_dim=128, ffn=ffn, vocab=128_256)


def _qwen_3(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, experts: Experts | None = None
) -> ModelShape:
    return ModelShape(layers, hidden, heads, kv_heads, 128, ffn, 151_936, experts)


MODELS: dict[str, ModelShape] = {
    "Llama-3-8B": _llama_3(32, 4096, 32, 14_336),
    "Llama-3-70B": _llama_3(80, 8192, 64, 28_672),
    "Llama-3.1-405B": _llama_3(126, 16_384, 128, 53_248),
    "Qwen3-8B": _qwen_3(36, 4096, 32, 8, 12_288),
    "Qwen3-32B": _qwen_3(64, 5120, 64, 8, 25_600),
    "Qwen3-30B-A3B": _qwen_3(48, 2048, 32, 4, 6144, Experts(128, 8, 768, 48)),
    "gpt-oss-120b": ModelShape(
        layers=36,
        hidden=2880,
        heads=64,
        kv_heads=8,
        head_dim=64,
        ffn=2880,
        vocab=201_088,
        experts=Experts(128, 4, 2880, 36),
        window=128,
        windowed_layers=18,
        expert_bytes=_QUANTIZED_BYTES["mxfp4"],
    ),
    "DeepSeek-V3": ModelShape(
        layers=61,
        hidden=7168,
        heads=128,
        kv_heads=128,
        head_dim=56,
        ffn=18_432,
        vocab=129_280,
        experts=Experts(256, 8, 2048, 58, shared_ffn=2048),
        latents=Latents(query_rank=1536, kv_rank=512, rope_dim=64, nope_dim=128, value_dim=128),
        dtype="fp8",
        weight_bytes=_QUANTIZED_BYTES["fp8"],
        expert_bytes=_QUANTIZED_BYTES["fp8"],
    ),
}
