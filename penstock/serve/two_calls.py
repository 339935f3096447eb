"""Prefill and decode as two requests to two servers: how vLLM and SGLang want to be asked.

vLLM (NixlConnector): the prefill server computes the prompt and one token, and answers with `kv_transfer_params`; with
these the decode server pulls the KV. SGLang: both get the same request at once, and meet at the prefill server's
bootstrap, in a room that we number.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import msgspec

from penstock.errors import WorkerError

Body = dict[str, object]

_PREFILL_ONLY: Mapping[str, object] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_NOT_FOR_PREFILL = ("stream_options", "min_tokens", "best_of")
ROOMS = 63  # bits


def vllm_prefill(body: Body) -> Body:
    """What the prefill server is asked for: the prompt's KV, and a token that nobody will see."""
    asked = {name: value for name, value in body.items() if name not in _NOT_FOR_PREFILL}
    asked |= {"stream": False, "n": 1, "max_tokens": 1, "kv_transfer_params": dict(_PREFILL_ONLY)}
    if "max_completion_tokens" in body:
        asked["max_completion_tokens"] = 1
    return asked


def vllm_decode(body: Body, answer: bytes) -> Body:
    """What the decode server is asked for, given the prefill server's answer. Raises WorkerError."""
    try:
        params = msgspec.json.decode(answer, type=dict[str, object]).get("kv_transfer_params")
    except msgspec.MsgspecError as error:
        raise WorkerError(f"the prefill server's answer is no JSON object: {error}") from error
    if not params:
        raise WorkerError(
            "the prefill server's answer has no kv_transfer_params; start it with a --kv-transfer-config that names "
            "NixlConnector"
        )
    return {**body, "kv_transfer_params": params}


def sglang_both(body: Body, host: str, port: int, rng: Random) -> Body:
    """What both servers are asked for. `host` and `port` are of the prefill server's bootstrap."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        count = len(prompt)
        rooms = [rng.getrandbits(ROOMS) for _ in prompt]
        return {**body, "bootstrap_host": [host] * count, "bootstrap_port": [port] * count, "bootstrap_room": rooms}
    return {**body, "bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": rng.getrandbits(ROOMS)}
