"""Checkpoints for the embedded engine: which it can serve, and what it computes with them.

Served is any decoder of transformers whose attention goes through `AttentionInterface` and whose cache is of one shape
in every layer: plain keys and values, over the whole context or a window, or latents (MLA).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from penstock.blocks import BlockId, Keeps, KvLayout, Region, deal_layers
from penstock.engine.api import FEATURES, EngineInfo, Scored, Slice
from penstock.engine.embedded_attention import NAME, Paged, Pool, Scratch
from penstock.engine.embedded_batch import Batch, Geometry, build
from penstock.engine.embedded_guides import Guides, read_tokenizer
from penstock.engine.embedded_options import Options
from penstock.engine.embedded_products import pack
from penstock.engine.embedded_sampling import Draw, Sampler, check_finite, with_logprobs
from penstock.errors import EngineFailed, SetupError, UnreadableModel, UnsupportedModel
from penstock.policy.latency.device import cpu
from penstock.policy.latency.roofline import Roofline
from penstock.policy.latency.shape import shape_of
from penstock.policy.latency.steps import UNKNOWN, StepModel
from penstock.request import Sampling, Token

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_SERVED = (
    "served are decoders that cache one shape in all layers: Llama, Qwen, Mistral, Gemma 3, gpt-oss, DeepSeek-V3..."
)
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_SCORED_LOGITS = 1 << 25  # computed at once for log probabilities of a prompt: 128 MiB in float32
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDING = {torch.float32: 0.001, torch.bfloat16: 0.3, torch.float16: 0.3}  # see `_error`; other attention: about 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is known of a model before its weights are read."""

    architecture: str
    config: PreTrainedConfig
    geometry: Geometry
    info: EngineInfo
    tokenizer: LLTokenizer | None  # as guides need it


# While from_pretrained runs, transformers patches its own classes for the whole process; two at a time leave a patch
# behind, and models loaded later lack their tied weights.
_LOADING = threading.Lock()


def read(options: Options) -> Checkpoint:
    """Reads the configuration. Raises UnreadableModel, UnsupportedModel, or SetupError for an impossible setting."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = options.model
    config = _read_config(model)
    text = config.get_text_config(decoder=True)
    architecture = _supported_architecture(model, config, text)
    geometry = _geometry(config, text, options)
    eos_token_ids = _eos_token_ids(model, text)
    tokenizer = read_tokenizer(model, text.vocab_size, eos_token_ids)
    info = EngineInfo(
        name="embedded",
        model=model,
        layout=geometry.layout,
        vocab_size=text.vocab_size,
        max_context_tokens=_context_limit(text, options),
        eos_token_ids=eos_token_ids,
        device=str(geometry.device),
        shares_memory=geometry.device.type == "cpu",
        supports=FEATURES if tokenizer else tuple(feature for feature in FEATURES if feature != "guide"),
        step_prior=_step_prior(text, geometry, options),
    )
    return Checkpoint(architecture, config, geometry, info, tokenizer)


def _step_prior(text: PreTrainedConfig, geometry: Geometry, options: Options) -> StepModel:
    """By the size of the model and the number of cores; of a GPU nothing is known before it was measured."""
    if geometry.device.type != "cpu":
        return UNKNOWN
    try:
        shape = shape_of(text.to_dict() | {"dtype": str(geometry.dtype).removeprefix("torch.")})
    except UnsupportedModel:  # by the roofline, which knows fewer than this engine
        return UNKNOWN
    return Roofline(shape, cpu(options.threads or torch.get_num_threads())).prior()


def load(checkpoint: Checkpoint, threads: int | None) -> LoadedModel:
    """Reads the weights, in the thread that will compute with them, and gives it `threads` to spread a step over.

    Raises UnreadableModel where weights are missing, UnsupportedModel where a trial step fails.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    folder = checkpoint.info.model
    auto: Any = AutoModelForCausalLM
    try:
        with _LOADING:
            model, report = auto.from_pretrained(
                folder,
                config=checkpoint.config,
                dtype=checkpoint.geometry.dtype,
                attn_implementation=NAME,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # every file format and quantization has errors of its own
        raise UnreadableModel(f"the weights of {folder} cannot be read: {_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UnreadableModel(f"{folder} lacks {len(missing)} weights of its architecture, such as {missing[0]}")
    loaded = LoadedModel(model.to(checkpoint.geometry.device).eval(), checkpoint)
    _try_out(loaded, checkpoint)
    return loaded


class LoadedModel:
    """Weights, and the arithmetic of one step. Used from one thread."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self._model = model
        self._geometry = checkpoint.geometry
        self._scratch = Scratch()
        self._sampler = Sampler(checkpoint.info.eos_token_ids, Guides(checkpoint.tokenizer))
        self._scored_tokens = max(1, _SCORED_LOGITS // checkpoint.info.vocab_size)

    def kv_room_bytes(self) -> int:
        """Most of what the GPU has free now; the rest is for activations. 0 on the CPU."""
        if self._geometry.device.type != "cuda":
            return 0
        free_bytes, _ = torch.cuda.mem_get_info(self._geometry.device)
        return int(0.85 * free_bytes)

    def prepare(self, pool: Pool) -> None:
        """Does ahead what the first steps in `pool` would wait for. Safe while a step in another one runs."""
        self._scratch.reserve(pool)

    @torch.inference_mode()
    def compute(self, slices: Sequence[Slice], pool: Pool) -> list[Token | None]:
        """One forward pass; a token for each slice with `sampling`, in order."""
        logits = self.logits(slices, pool)
        asked = [Draw(s.sampling, s.start + len(s.tokens), s.past) for s in slices if s.sampling is not None]
        if len(logits) != len(asked):
            raise ValueError(f"the model gave logits for {len(logits)} tokens, asked for {len(asked)}")
        tokens = iter(self._sampler.sample(logits, asked) if asked else ())
        return [None if s.sampling is None else next(tokens) for s in slices]

    @torch.inference_mode()
    def logits(self, slices: Sequence[Slice], pool: Pool) -> Tensor:
        """One forward pass; [slices with `sampling`, vocabulary]."""
        batch = build(slices, self._geometry)
        return self._forward(batch, batch.sampled, pool)

    def pack(self, tokens: Sequence[int]) -> Tensor:
        """Lays out weights for this CPU, as a pass over `tokens` shows they are used; its `own_logits`."""
        return pack(self._model, partial(self.own_logits, tokens))

    @torch.inference_mode()
    def own_logits(self, tokens: Sequence[int]) -> Tensor:
        """[1, vocabulary] of what follows `tokens`, by transformers' plainest attention and without a cache."""
        self._model.set_attn_implementation("eager")
        try:
            output = self._model(input_ids=self._geometry.tensor(list(tokens))[None], use_cache=False, logits_to_keep=1)
        finally:
            self._model.set_attn_implementation(NAME)
        logits: Tensor = output.logits[0]
        return logits

    def score(self, slices: Sequence[Slice], pool: Pool) -> list[Scored]:
        """One forward pass for all slices without `scores`, and others for the rest: logits of prompts are large."""
        plain = [part for part in slices if part.scores is None]
        sampled = iter(self.compute(plain, pool) if plain else ())
        return [Scored(next(sampled)) if s.scores is None else self._score(s, s.scores, pool) for s in slices]

    @torch.inference_mode()
    def _score(self, part: Slice, top: int, pool: Pool) -> Scored:
        told: list[Token] = []
        sampled: Token | None = None
        for piece in _pieces(part, self._scored_tokens):
            batch = build([piece], self._geometry)
            logits = self._forward(batch, torch.arange(len(piece.tokens), device=self._geometry.device), pool).float()
            end = piece.start + len(piece.tokens)
            check_finite(logits.amax(-1), [(piece.past.sequence, at) for at in range(piece.start + 1, end + 1)])
            follow = piece.past.tokens[piece.start + 1 : min(end + 1, piece.past.prompt_tokens)]
            if follow:
                told += with_logprobs(logits[: len(follow)], follow, [top] * len(follow))
            if piece.sampling is not None:
                (sampled,) = self._sampler.sample(logits[-1:], [Draw(piece.sampling, end, piece.past)])
        return Scored(sampled, told)

    def _forward(self, batch: Batch, keep: Tensor, pool: Pool) -> Tensor:
        """The logits [kept, vocabulary] after tokens `keep` of the batch's row."""
        paged = Paged(pool, batch, self._scratch)
        paged.clear_fresh()
        output = self._model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            past_key_values=paged,
            use_cache=True,
            logits_to_keep=keep,
            paged=paged,
        )
        logits: Tensor = output.logits[0]
        return logits


def _pieces(part: Slice, most_tokens: int) -> Iterator[Slice]:
    """The slice as several, one after the other; the last samples what it does."""
    for at in range(0, len(part.tokens), most_tokens):
        tokens = part.tokens[at : at + most_tokens]
        is_last = at + most_tokens >= len(part.tokens)
        yield replace(part, tokens=tokens, start=part.start + at, sampling=part.sampling if is_last else None)


def map_region(region: Region, geometry: Geometry) -> Pool:
    """The region as tensors: views of its buffer on the CPU, memory of its own elsewhere. Raises EngineFailed."""
    if region.layout != geometry.layout:
        raise EngineFailed(f"{region.owner} lays out KV as {region.layout}, this engine as {geometry.layout}")
    if geometry.device.type != "cpu":
        elements = region.blocks * region.layout.block_bytes // geometry.dtype.itemsize
        return Pool(torch.zeros(elements, dtype=geometry.dtype, device=geometry.device), region.layout)
    if region.buffer is None:
        raise EngineFailed(f"the region of {region.owner} is in memory that this process cannot reach")
    return Pool(torch.frombuffer(region.buffer, dtype=geometry.dtype), region.layout)


def _read_config(model: str) -> PreTrainedConfig:
    if Path(model).is_dir() and not Path(model, "config.json").is_file():
        raise UnreadableModel(f"{model} is no model folder: it has no config.json")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except OSError as error:
        raise UnreadableModel(f"{model} is neither a model folder nor a hub id: {_line(error)}") from error
    except ValueError as error:
        raise UnsupportedModel(f"{model}: {_line(error)}; {_SERVED}") from error
    return config


def _line(error: Exception) -> str:
    """The first line of a message: transformers says the rest at length."""
    return next(filter(None, str(error).splitlines()), type(error).__name__)


def _supported_architecture(model: str, config: PreTrainedConfig, text: PreTrainedConfig) -> str:
    """Its name. Refuses what the configuration alone can tell; the rest shows when the loaded model is tried out."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    default = type(config).__name__ if kind is None else kind.__name__
    name: str = (config.architectures or [default])[0]
    if kind is None or config.is_encoder_decoder or name != default:
        raise UnsupportedModel(f"{model}: {name} is no decoder that generates text; {_SERVED}")
    for objection in _objections(kind, text):
        raise UnsupportedModel(f"{model}: {name} {objection}; {_SERVED}")
    return name


def _objections(kind: Any, text: PreTrainedConfig) -> Iterator[str]:
    """Why such a cache does not do. Later questions make sense only where earlier ones pass."""
    if kind._is_stateful:
        yield "keeps a state that is not keys and values"
    if not kind._supports_attention_backend:
        yield "does not use AttentionInterface"
    if text.is_heterogeneous:
        yield "has layers of different shapes"
    strange = sorted(set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES)
    if strange:
        yield f"has layers of type {', '.join(strange)}"
    if not _is_latent(text) and getattr(text, "v_head_dim", None) not in (None, _head_dim(text)):
        yield "caches values of another width than keys"
    if getattr(text, "num_kv_shared_layers", 0):
        yield "shares keys and values between layers"


def _geometry(config: PreTrainedConfig, text: PreTrainedConfig, options: Options) -> Geometry:
    device = _device(options.device)
    dtype = _dtype(options.dtype, config, device)
    sides, kv_heads, head_dim = _row_shape(text)
    layers, keeps, places = deal_layers(_keeps(text))
    layout = KvLayout(
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=options.block_tokens,
        dtype=str(dtype).removeprefix("torch."),
        sides=sides,
        keeps=keeps,
    )
    return Geometry(layout, text.num_attention_heads, dtype, device, places)


def _keeps(text: PreTrainedConfig) -> list[Keeps]:
    """By layer, how many of the tokens before it a token reads. A window that no context exceeds is none.

    As the configuration says; `Paged.check_window` sees in the trial step whether attention reads more.
    """
    layers: int = text.num_hidden_layers
    window: int | None = getattr(text, "sliding_window", None)
    if window is None or window >= (getattr(text, "max_position_embeddings", None) or sys.maxsize):
        return ["all"] * layers
    types: list[str] = getattr(text, "layer_types", None) or ["sliding_attention"] * layers
    return [max(1, window - 1) if kind == "sliding_attention" else "all" for kind in types]


def _row_shape(text: PreTrainedConfig) -> tuple[int, int, int]:
    """Sides, heads and width of what a layer caches of a token: keys and values, or one latent for all heads."""
    if _is_latent(text):
        return 1, 1, text.kv_lora_rank + text.qk_rope_head_dim
    return 2, getattr(text, "num_key_value_heads", None) or text.num_attention_heads, _head_dim(text)


def _is_latent(text: PreTrainedConfig) -> bool:
    return getattr(text, "kv_lora_rank", None) is not None


def _head_dim(text: PreTrainedConfig) -> int:
    dim: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return dim


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        raise SetupError(f"device {device!r} cannot be used: {_line(error)}; try 'cpu' or 'auto'") from error


def _dtype(dtype: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """`auto` is exact on the CPU, and what the checkpoint was made in elsewhere."""
    if dtype == "auto":
        made_in = torch.float32 if device.type == "cpu" else config.dtype
        return next((known for known in _DTYPES if known == made_in), torch.bfloat16)
    for known in _DTYPES:
        if str(known) == f"torch.{dtype}":
            return known
    raise SetupError(f"dtype {dtype!r} is unknown; give 'auto', 'float32', 'bfloat16' or 'float16'")


def _context_limit(text: PreTrainedConfig, options: Options) -> int:
    """The model's own limit, or less if asked."""
    own: int | None = getattr(text, "max_position_embeddings", None)
    rope: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond it, one long sequence would change the rotation of all others
        own = min(own or sys.maxsize, rope["original_max_position_embeddings"])
    limit = own if options.max_context_tokens is None else options.max_context_tokens
    if limit is None:
        raise SetupError(f"{options.model} names no longest context; give max_context_tokens")
    if own is not None and limit > own:
        raise SetupError(f"max_context_tokens {limit} is over the {own} that {options.model} can do; lower it")
    return limit


def _eos_token_ids(model: str, text: PreTrainedConfig) -> tuple[int, ...]:
    """Those that the generation settings name, else the configuration's."""
    try:
        found = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # the file is optional
        found = None
    if found is None:
        found = text.eos_token_id
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


def _try_out(loaded: LoadedModel, checkpoint: Checkpoint) -> None:
    """Computes a block of each group, in one step and its last token alone again; also warms up.

    Every layer must write keys and values of the layout's shape, and the logits be those of transformers' attention.
    """
    geometry, who = checkpoint.geometry, f"{checkpoint.info.model}: {checkpoint.architecture}"
    layout = geometry.layout
    table = [BlockId(group) for group in range(len(layout.keeps))]
    elements = len(table) * layout.block_bytes // geometry.dtype.itemsize
    pool = Pool(torch.full((elements,), torch.nan, dtype=geometry.dtype, device=geometry.device), layout)
    tokens = [i % checkpoint.info.vocab_size for i in range(layout.block_tokens)]
    steps = [Slice(tokens[at:], at, table, Sampling(max_tokens=1)) for at in (0, len(tokens) - 1)]
    try:
        own = loaded.pack(tokens)
        found = torch.cat([loaded.logits([step], pool) for step in steps])
    except Exception as error:
        raise UnsupportedModel(f"{who} failed a trial step: {_line(error)}; {_SERVED}") from error
    written = pool.blocks.view(len(table), layout.layers, -1).isfinite().all(-1).tolist()
    silent = [layer for layer, (group, place) in enumerate(geometry.places) if not written[group][place]]
    if silent:
        raise UnsupportedModel(f"{who} caches no keys and values in layers {silent}; {_SERVED}")
    if not found.isfinite().all():
        raise UnsupportedModel(f"{who} overflows in {layout.dtype}; choose another dtype")
    if not _error(found, own) <= _ROUNDING[geometry.dtype]:  # NaN is an error too
        raise UnsupportedModel(f"{who} does not attend as this engine does: its own attention gives other logits")


def _error(found: Tensor, own: Tensor) -> float:
    """How far logits are off, root mean square, in standard deviations of the right ones; of rows the worst."""
    off = (found.float() - own.float()).square().mean(-1).sqrt()
    return float((off / own.float().std(-1).clamp_min(torch.finfo(torch.float32).tiny)).max())
