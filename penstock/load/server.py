"""What a server tells of itself before it is put under load: its model, whether it answers, how it counts tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec

from penstock.errors import SetupError
from penstock.load.answer import Answer, reason
from penstock.load.generator import Asking
from penstock.load.http import Http, NoReply, Reply, Sink
from penstock.load.prompts import CountTokens, counting, path
from penstock.load.record import UNKNOWN

PATIENCE_S = 60.0  # with a server that is asked its first question


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def find_model(http: Http, model: str) -> str:
    """The model to ask: `model` if that is given, else the only one that is served. Raises SetupError."""
    listing = bytearray()
    reply = await _ask(http, "GET", "/v1/models", b"", lambda piece, at_s: listing.extend(piece))
    if reply.status in (401, 403):
        raise SetupError(f"{_refused(reply, '/v1/models')}: set PENSTOCK_API_KEY to the server's key")
    if reply.status != 200 and not model:
        raise SetupError(f"{_refused(reply, '/v1/models')}: name the --model")
    if model:
        return model
    try:
        names = [one.id for one in msgspec.json.decode(listing, type=_Models).data]
    except msgspec.DecodeError as error:
        raise SetupError(f"/v1/models is no list of models ({error}): name the --model") from None
    if len(names) != 1:
        raise SetupError(f"the server has {', '.join(names) or 'no model'}: name one with --model")
    return names[0]


def count_tokens(http: Http, asking: Asking) -> CountTokens:
    """Has the server count prompts, with a request for one token each, which raises SetupError where that fails."""

    async def count(text: str) -> int:
        answer = await try_once(http, asking, counting(asking.endpoint, text))
        if answer.usage.prompt_tokens == UNKNOWN:
            raise SetupError("the server counts no tokens, its streams have no usage: use --endpoint completions")
        return answer.usage.prompt_tokens

    return count


async def try_once(http: Http, asking: Asking, prompt: Mapping[str, object]) -> Answer:
    """The answer to a request like those to come, for one token. Raises SetupError if there is none, and says why."""
    answer = Answer(lambda at_s: None)
    where = path(asking.endpoint)
    reply = await _ask(http, "POST", where, asking.body(prompt, 1), answer.feed)
    if reply.status != 200:
        raise SetupError(
            f"{_refused(reply, where)}: --endpoint, --tokenizer, --no-ignore-eos and --body change what it is asked"
        )
    if answer.error:
        raise SetupError(f"the server answers {where} with 200 and no stream of OpenAI's ({answer.error})")
    return answer


async def _ask(http: Http, method: str, path: str, body: bytes, sink: Sink) -> Reply:
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await http.ask(method, http.base + path, body, sink)
    except NoReply as failure:
        raise SetupError(f"no server answers at {http.url} ({failure}): `penstock serve` starts one") from None
    except TimeoutError:
        raise SetupError(f"{http.url}{path} does not answer within {PATIENCE_S:g} s") from None


def _refused(reply: Reply, path: str) -> str:
    why = reason(reply.body)
    return f"the server answers {path} with HTTP {reply.status}" + f" ({why})" * bool(why)
