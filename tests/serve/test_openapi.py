"""The API's description, and the frontend held against it by requests that schemathesis makes from it, good and bad."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from penstock.serve import openapi
from penstock.serve.frontend import Frontend
from penstock.serve.http_server import serve_http
from tests.serve.fake_backend import FakeBackend, chat_body, failing, frontend
from tests.serve.test_frontend import chat, complete, get, play

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


# What it says


def test_it_describes_what_the_frontend_serves() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        described = (await get(app, "/openapi.json")).json
        methods = {path: next(iter(operations)).upper() for path, operations in described["paths"].items()}
        assert methods == {path + openapi.PAGES[path].suffix: method for path, method in app.routes().items()}

    play(story)


def test_every_reference_leads_somewhere() -> None:
    document = openapi.document()
    text = json.dumps(document)
    named = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert named <= set(document["components"]["schemas"])
    assert not any(name.startswith("_") for name in document["components"]["schemas"])


def test_bodies_are_described_as_they_are_parsed() -> None:
    schemas = openapi.document()["components"]["schemas"]
    body = schemas["ChatBody"]
    assert body["additionalProperties"] is False
    assert body["required"] == ["messages", "model"]
    assert body["properties"]["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 2}
    assert body["properties"]["messages"]["items"]["$ref"] == "#/components/schemas/Message"
    assert schemas["Message"]["properties"]["annotations"]["enum"] == [None, []]
    for field, schema in schemas["CompletionBody"]["properties"].items():
        assert schema, f"{field} is not described"


def test_events_are_as_described() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        wishes = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True, **TIMELINE}
        for client, kind in (
            (await chat(app, **wishes), openapi.ChatEvent),
            (await complete(app, **wishes), openapi.TextEvent),
        ):
            *events, done = client.events
            assert done == "[DONE]"
            for event in events:
                assert is_in(event, msgspec.to_builtins(msgspec.convert(event, kind)))

    play(story)


def test_no_field_of_a_whole_answer_is_left_out() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        wishes = {"prompt_logprobs": 0, "return_token_ids": True, **TIMELINE}
        for client, kind in (
            (await chat(app, **wishes), openapi.ChatAnswer),
            (await complete(app, **wishes), openapi.TextAnswer),
        ):
            assert is_in(client.json, msgspec.to_builtins(msgspec.convert(client.json, kind)))

    play(story)


TIMELINE = {"penstock": {"timeline": True}}


def is_in(part: object, whole: object) -> bool:
    """Whether every field of the one, however deep, is in the other."""
    match part, whole:
        case dict(), dict():
            names = [name for name in part if name != "penstock"]  # whose struct leaves defaults out
            return all(name in whole and is_in(part[name], whole[name]) for name in names)
        case list(), list():
            return all(map(is_in, part, whole))
    return True


def test_a_stream_that_fails_ends_as_described() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        *_, last = (await chat(app, stream=True)).events
        assert msgspec.convert(last, openapi.Error).error.message

    play(story, failing(RuntimeError("a fault"), after="water"))


# The frontend against it


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A frontend on a real socket, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    loop = asyncio.new_event_loop()
    ends = asyncio.Event()

    async def serve() -> None:
        async with frontend(FakeBackend()) as app, serve_http(app, listener, lambda: 5.0):
            await ends.wait()

    thread = threading.Thread(target=lambda: asyncio.Runner(loop_factory=lambda: loop).run(serve()))
    thread.start()
    yield "http://{}:{}".format(*listener.getsockname())
    loop.call_soon_threadsafe(ends.set)
    thread.join()
    loop.close()


def described() -> list[APIOperation[Any, Any, Any, Any]]:
    """All operations, with a model that is there; else every request would end with a 404."""
    document = openapi.document()
    for name in ("ChatBody", "CompletionBody"):
        document["components"]["schemas"][name]["properties"]["model"] = {"enum": ["demo"]}
    return [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]


def asked() -> list[Any]:
    """Each operation with data of each kind; what takes no body can be asked in no wrong way."""
    kinds = {True: list(GenerationMode), False: [GenerationMode.POSITIVE]}
    return [
        pytest.param(operation, mode, id=f"{operation.path}-{mode.value}")
        for operation in described()
        for mode in kinds[bool(operation.body)]
    ]


@pytest.mark.parametrize(("operation", "mode"), asked())
def test_it_answers_as_described(operation: Any, mode: GenerationMode, address: str) -> None:
    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: Case) -> None:
        case.call_and_validate(base_url=address, checks=CHECKS, timeout=10)

    check()


def test_a_good_request_is_served_there(address: str) -> None:
    """Else the test above could pass on refusals alone."""
    import httpx

    assert httpx.post(f"{address}/v1/chat/completions", json=chat_body()).status_code == 200
