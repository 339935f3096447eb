"""Attention over latents (MLA): what is cached of a token is one row for all heads, not keys and values of each.

    row     = latent (kv_lora_rank) | rotated key (qk_rope_head_dim)        cached, one head
    key     = up_key[head] @ latent | rotated key                           never made
    value   = up_value[head] @ latent                                       never made

    query . key          = (up_key[head].T @ query | rotated query) . row   compress_queries
    sum of weight * value = up_value[head] @ (sum of weight * latent)       expand_outputs

So attention runs over the cached rows as they are, all query heads sharing one head of keys, and a step costs no
expansion of its context. In return scores are products over the width of a latent: a long prefill takes more
arithmetic than it would with keys and values made.

`module` is a layer's attention as the DeepSeek-V2 family of transformers has it. Its `kv_b_proj` holds, head by head,
up_key above up_value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def compress_queries(module: Any, query: Tensor) -> Tensor:
    """[1, heads, tokens, qk_nope_head_dim + qk_rope_head_dim] to [1, heads, tokens, width of a row]."""
    plain = module.qk_nope_head_dim
    compressed = torch.bmm(query[0, ..., :plain], _up(module)[:, :plain])
    return torch.cat((compressed, query[0, ..., plain:]), -1)[None]


def expand_outputs(module: Any, outputs: Tensor) -> Tensor:
    """Weighted sums of rows [tokens, heads, width of a row] to those of values [tokens, heads, v_head_dim]."""
    up_value = _up(module)[:, module.qk_nope_head_dim :]
    latents = outputs[..., : module.kv_lora_rank].transpose(0, 1)
    return torch.bmm(latents, up_value.mT).transpose(0, 1)


def _up(module: Any) -> Tensor:
    """[heads, qk_nope_head_dim + v_head_dim, kv_lora_rank]."""
    weight: Tensor = module.kv_b_proj.weight
    return weight.view(-1, module.qk_nope_head_dim + module.v_head_dim, module.kv_lora_rank)
