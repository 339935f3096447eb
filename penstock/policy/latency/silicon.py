"""Step times from tables that NVIDIA measured on GPUs, by aiconfigurator-core (extra `silicon`).

It needs no GPU. It knows the models whose config.json it brings (a hub id such as "Qwen/Qwen3-32B", or a folder with a
config.json of a family that it has tables for), the systems `a100_sxm`, `h100_sxm`, `h200_sxm`, `b200_sxm`, `gb200` and
others, and the engines `vllm`, `sglang` and `trtllm`. Its times are those of kernels: the host's part is added here.

Tables are read from the package's files when a `Silicon` is made, which takes about a second; asking takes 0.1 ms.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from penstock.errors import MissingExtra, SetupError
from penstock.policy.latency.device import HOST_S
from penstock.policy.latency.steps import Mix, StepModel, prior_of

DOUBT = 0.2  # kernels were measured, alone and at other sizes


class Silicon:
    """`model` on `gpus` of a `system` with tensor parallelism, served by `engine`."""

    def __init__(self, model: str, system: str, engine: str = "vllm", gpus: int = 1) -> None:
        """Raises MissingExtra without the package, SetupError for what it has no tables for."""
        try:
            core = import_module("aiconfigurator_core")
            compile_engine = import_module("aiconfigurator_core.sdk").compile_engine
        except ImportError:
            raise MissingExtra(
                "measured step times need aiconfigurator-core: pip install 'penstock[silicon]'"
            ) from None
        self._who = f"{model} on {gpus} x {system} with {engine}"
        try:
            spec = compile_engine(model, system, engine, tp_size=gpus, moe_tp_size=gpus)
            self._tables: Any = core.AicEngine.from_spec(spec)
        except Exception as error:  # it raises whatever its parts raise, asserts among them
            raise SetupError(f"aiconfigurator-core has no tables for {self._who}: {error}") from error

    def step_s(self, mix: Mix) -> float:
        """Seconds of a step; 0 for an empty one. Raises SetupError where no table comes near."""
        try:
            return self._kernels_ms(mix) / 1e3 + HOST_S if mix.tokens + mix.sequences else 0.0
        except Exception as error:  # see above
            raise SetupError(f"aiconfigurator-core has no table for {mix} of {self._who}: {error}") from error

    def prior(self, doubt: float = DOUBT, expert_share: float = 0.0) -> StepModel:
        """`expert_share` is that of the model's shape."""
        return prior_of(self.step_s, doubt, expert_share)

    def _kernels_ms(self, mix: Mix) -> float:
        if mix.sequences == 0:
            return float(self._tables.predict_prefill_latency(1, mix.context + mix.tokens, mix.context))
        if mix.tokens == 0:
            return float(self._tables.decode_step_latency(mix.sequences, mix.depth, 2))
        # It takes decodes to be as deep as the prompt is long, so it is asked once for each. Of attention it gives the
        # chunk an even share, as if the whole prompt were cut like this.
        end = mix.context + mix.tokens
        _, products, chunk, _ = self._tables.mixed_step_breakdown(mix.tokens, mix.sequences, end, 2, mix.context)
        _, _, _, decodes = self._tables.mixed_step_breakdown(mix.tokens, mix.sequences, mix.depth, 2)
        return float(products + chunk * -(-end // mix.tokens) + decodes)
