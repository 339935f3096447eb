"""What the embedded engine can be told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Options:
    """`model` is a folder or a hub id."""

    model: str
    device: str = "auto"  # CUDA where there is one; "cpu", "cuda", "cuda:1"
    dtype: str = "auto"  # float32 on the CPU, elsewhere the checkpoint's
    threads: int | None = None  # of one step, on the CPU; None: torch's choice, which is every core
    block_tokens: int = 16
    max_context_tokens: int | None = None  # None: what the model was made for
