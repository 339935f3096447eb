"""How long a step should take, from the size of the model and the data sheet of the device: a prior, not a promise.

A step multiplies (products against weights), attends, moves activations between the layers and over the links, and
starts kernels. Each part is bound by arithmetic or by memory, whichever is slower, and both where they are near:

    part        arithmetic                               memory
    products    2 * parameters * tokens                  weights, each once
    chunk       2 * heads * (key + value dim) * pairs    KV of the context
    decodes     the same, per token attended to          KV of all contexts
    between     -                                        what norms and activations read and write
    links       two all-reduces a layer

With tensor parallelism every GPU has its share of weights and heads; a latent (MLA) is read by each of them.

Where the efficiencies come from: in Vidur's profile of an H100 (`mlp_up_proj`) products reach 0.70 to 0.76 of the peak
from 512 tokens, 0.60 at 256, 0.36 at 128 and 0.10 at 32, and weights are read at 0.81 to 0.90 of the bandwidth (A100:
0.69 to 0.78, and 0.69 to 0.81). One efficiency for each, and `_either`, reproduce the H100's points to 0.02. Attention
comes to 0.6 of the peak and 0.7 of the bandwidth, experts to 0.35 of the peak, in the H100 tables of aiconfigurator
0.12. Against these tables, with `host_s` left out, steps of Llama-3, Qwen3 and gpt-oss on A100, H100, H200 and B200
are off by 8 % in the median and 30 % in one of ten; DeepSeek-V3 comes out at half of what they say for vLLM's prefill.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.policy.latency.device import Rank
from penstock.policy.latency.shape import ModelShape
from penstock.policy.latency.steps import Mix, StepModel, chosen_share, prior_of

PRODUCTS = 0.73  # of the peak
EXPERTS = 0.35
WEIGHTS = 0.85  # of the memory bandwidth
ATTENTION = 0.6
KV_READS = 0.7
ALL_REDUCE_S = 8e-6  # of a few bytes, by the kernels that engines bring; NCCL takes 37 us (H100) to 62 us (A100)
DOUBT = 0.5  # how far off it may be on a device and engine that nobody has measured
ACTIVATION_BYTES = 2


@dataclass(frozen=True, slots=True)
class Roofline:
    """`model` on `gpus` devices with tensor parallelism, each of them like `rank`."""

    model: ModelShape
    rank: Rank
    gpus: int = 1

    def step_s(self, mix: Mix) -> float:
        """Seconds of a step; 0 for an empty one."""
        tokens = mix.tokens + mix.sequences
        if tokens == 0:
            return 0.0
        return (
            self.rank.host_s
            + self._kernels_s
            + self._products_s(tokens, sampled=mix.sequences + (mix.tokens > 0))
            + self._experts_s(tokens)
            + self._chunk_s(mix)
            + self._decodes_s(mix)
            + self._between_s(tokens)
            + self._links_s(tokens)
        )

    def prior(self, doubt: float = DOUBT) -> StepModel:
        return prior_of(self.step_s, doubt, self.model.expert_share)

    @property
    def _kernels_s(self) -> float:
        """Starting them, whatever they do. Experts are chosen and called by some more, latents by many more."""
        model = self.model
        batches = model.layers * (5 if model.latents else 1) + (model.experts.layers if model.experts else 0)
        return batches * self.rank.layer_s

    def _products_s(self, tokens: int, sampled: int) -> float:
        model = self.model
        flops = 2 * (model.dense_parameters * tokens + model.head_parameters * sampled)
        read_bytes = (model.dense_parameters + model.head_parameters) * model.weight_bytes
        return self._weighted_s(flops, PRODUCTS, read_bytes)

    def _experts_s(self, tokens: int) -> float:
        """Weights are read of those experts that some token chose, all being equally likely."""
        model = self.model
        if (experts := model.experts) is None:
            return 0.0
        flops = 2 * experts.active * model.expert_parameters * tokens
        chosen = experts.count * chosen_share(tokens, model.expert_share)
        read_bytes = chosen * model.expert_parameters * model.expert_bytes
        return self._weighted_s(flops, EXPERTS, read_bytes)

    def _chunk_s(self, mix: Mix) -> float:
        model = self.model
        key_dim = value_dim = model.head_dim
        if (mla := model.latents) is not None:
            key_dim, value_dim = mla.nope_dim + mla.rope_dim, mla.value_dim
        pairs = (model.layers - model.windowed_layers) * _pairs(mix.tokens, mix.context, mix.tokens + mix.context)
        pairs += model.windowed_layers * _pairs(mix.tokens, mix.context, model.window)
        flops = 2 * model.heads * (key_dim + value_dim) * pairs
        return self._attended_s(flops, model.kv_held_bytes(mix.context))

    def _decodes_s(self, mix: Mix) -> float:
        """A latent is attended to as it is: keys are latent and rotary part, values the latent again."""
        model = self.model
        key_dim = value_dim = model.head_dim
        if (mla := model.latents) is not None:
            key_dim, value_dim = mla.kv_rank + mla.rope_dim, mla.kv_rank
        read_bytes = mix.sequences * model.kv_held_bytes(mix.depth)
        attended = read_bytes / model.kv_layer_bytes
        flops = 2 * model.heads * (key_dim + value_dim) * attended
        return self._attended_s(flops, read_bytes)

    def _between_s(self, tokens: int) -> float:
        """Norms pass over the hidden state 8 times a layer, on every GPU; the FFN's activation thrice, on its share."""
        model = self.model
        experts = model.experts
        ffn = experts.active * experts.ffn + experts.shared_ffn if experts else model.ffn
        elements = tokens * model.layers * (8 * model.hidden + 3 * ffn / self.gpus)
        return elements * ACTIVATION_BYTES / (self.rank.memory_bytes_per_s * WEIGHTS)

    def _links_s(self, tokens: int) -> float:
        """Of an all-reduce among g GPUs, 2 (g - 1) / g of the result passes each link."""
        if self.gpus == 1:
            return 0.0
        passing = 2 * (self.gpus - 1) / self.gpus * tokens * self.model.hidden * ACTIVATION_BYTES
        return 2 * self.model.layers * (ALL_REDUCE_S + passing / self.rank.link_bytes_per_s)

    def _weighted_s(self, flops: float, of_peak: float, read_bytes: float) -> float:
        """Products against weights, shared evenly by all GPUs."""
        return self._bound_s(flops, self.rank.peak_flops_per_s(self.model.dtype) * of_peak, read_bytes, WEIGHTS)

    def _attended_s(self, flops: float, read_bytes: float) -> float:
        """Heads are shared evenly, bytes of KV as far as they can be. Nobody attends in fewer than 16 bits."""
        dtype = "bfloat16" if self.model.dtype == "fp8" else self.model.dtype
        peak = self.rank.peak_flops_per_s(dtype) * ATTENTION
        return self._bound_s(flops, peak, read_bytes * self.model.kv_copies(self.gpus), KV_READS)

    def _bound_s(self, flops: float, flops_per_s: float, read_bytes: float, of_bandwidth: float) -> float:
        arithmetic_s = flops / (self.gpus * flops_per_s)
        memory_s = read_bytes / (self.gpus * self.rank.memory_bytes_per_s * of_bandwidth)
        return _either(arithmetic_s, memory_s)


def _either(arithmetic_s: float, memory_s: float) -> float:
    """Near the greater of the two, above it where they are alike: neither overlaps the other perfectly."""
    return float((arithmetic_s**4 + memory_s**4) ** 0.25)


def _pairs(tokens: int, context: int, window: int) -> float:
    """Pairs of a new token and one that it sees, itself included, none further back than `window`."""
    growing = max(0, min(tokens, window - context))  # tokens that see all before them
    return growing * (context + (growing + 1) / 2) + (tokens - growing) * window
