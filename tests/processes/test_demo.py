"""The bundled model, served as `make serve` does it, asked with the official client."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from tests.processes.server import MODEL, Server, serving
from tests.support import run

pytest.importorskip("torch")

TIMELINE = {"penstock": {"timeline": True}}
EARLIER = [
    {"role": "user", "content": "What is a KV cache?"},
    {"role": "assistant", "content": "It holds the keys and values of every past token."},
]


def questions() -> dict[str, str]:
    """Answers by first phrasing, from the text that the model was trained on."""
    lines = (MODEL.parents[2] / "training" / "demo" / "questions.txt").read_text().splitlines()
    found, asked = {}, ""
    for line in lines:
        if line.startswith("= "):
            found[asked], asked = line[2:], ""
        elif line and not line.startswith("#"):
            asked = asked or line
    return found


async def ask(server: Server, question: str, **more: Any) -> ChatCompletion:
    messages: Any = [*more.pop("before", ()), {"role": "user", "content": question}]
    return await server.client.chat.completions.create(
        model="demo", messages=messages, temperature=0, extra_body=TIMELINE, **more
    )


def timeline(answer: ChatCompletion) -> dict[str, Any]:
    found: dict[str, Any] = (answer.model_extra or {})["penstock"]["timeline"]
    return found


def logprobs(answer: ChatCompletion) -> list[float]:
    content = answer.choices[0].logprobs
    assert content is not None and content.content is not None
    return [token.logprob for token in content.content]


def test_answers_are_right_and_nothing_is_copied() -> None:
    async def story() -> None:
        async with serving(engine=None) as server:
            known = questions()
            some = list(known)[::12]
            answers = await asyncio.gather(*(ask(server, question) for question in some))
            assert [answer.choices[0].message.content for answer in answers] == [known[question] for question in some]
            in_place = [timeline(answer) for answer in answers if timeline(answer)["path"] == "in-place"]
            assert in_place and all(one["copied_bytes"] == 0 and one["moved_tokens"] > 0 for one in in_place)
            streamed = await server.client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": some[0]}], temperature=0, stream=True
            )
            text = "".join([event.choices[0].delta.content or "" async for event in streamed])
            assert text == known[some[0]]
            await server.wait_at_rest()

    run(story(), timeout_s=120)


def test_logprobs_are_the_same_whoever_prefilled() -> None:
    async def story(*workers: str) -> tuple[list[float], str]:
        async with serving(*workers, engine=None) as server:
            answer = await ask(server, "What is a lease?", before=EARLIER * 4, logprobs=True)
            return logprobs(answer), timeline(answer)["path"]

    disaggregated, path = run(story("--policy=p_token"), timeout_s=60)
    aggregated, local = run(story("--workers=1"), timeout_s=60)
    assert (path, local) == ("in-place", "local")
    assert max(abs(a - b) for a, b in zip(disaggregated, aggregated, strict=True)) == 0
