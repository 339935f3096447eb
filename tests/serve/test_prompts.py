"""Prompts of requests for other servers, as tokens."""

from __future__ import annotations

import msgspec
import pytest

from penstock.errors import BadRequest
from penstock.serve.chat_template import ChatTemplate
from penstock.serve.prompts import Prompts, read_wanted
from penstock.serve.text import Tokenizer
from penstock.serve.upstream import Upstream
from penstock.tokens import unpack
from tests.serve.fake_servers import FakeServer, up
from tests.serve.tokenizers_made import byte_level
from tests.support import run

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def tokens(fields: dict[str, object], has_tokenizer: bool = True) -> list[int]:
    tokenizer = Tokenizer(byte_level(), ChatTemplate(TEMPLATE, {}), "m") if has_tokenizer else None
    prompts = Prompts(tokenizer, Upstream())
    wanted = read_wanted(msgspec.json.encode(fields))
    return list(unpack(run(prompts.tokens(wanted, 4096, None))))


def encoded(text: str) -> list[int]:
    return list(run(Tokenizer(byte_level(), None, "m").encode_text(text, 4096)))


def asked(content: object, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}], **more}


def test_with_the_models_tokenizer_they_are_what_the_server_computes() -> None:
    assert tokens({"prompt": "some water"}) == encoded("some water")
    chat = tokens(asked("some water"))
    assert byte_level().decode(chat, skip_special_tokens=False) == "<user>some water<assistant>"
    assert tokens(asked([{"type": "text", "text": "some water"}])) == chat


def test_tokens_are_taken_as_they_are() -> None:
    assert tokens({"prompt": [5, 6, 7]}) == [5, 6, 7]
    assert tokens({"prompt": [[5, 6], [7]]}) == [5, 6]
    assert tokens({"prompt": ["some water", "other"]}) == encoded("some water")


@pytest.mark.parametrize(
    "fields",
    [
        asked([{"type": "image_url", "image_url": {"url": "data:"}}]),
        asked("x", tools=TOOLS),
        {"input": "an embedding"},
        {"prompt": [-1]},
        {},
    ],
)
def test_what_cannot_be_tokenized_still_has_a_length(fields: dict[str, object]) -> None:
    assert len(tokens(fields)) >= 1


def test_without_a_tokenizer_equal_beginnings_of_text_are_equal() -> None:
    one, two = (tokens(asked("so it begins " * 9 + end), False) for end in ("here", "there"))
    assert len(one) > 20
    assert one[:20] == two[:20] != one[-20:]
    assert tokens({"prompt": "12345678"}, False) == tokens({"prompt": "123456789"}, False)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"model": 3}', b'{"prompt": {}}', b"\xff"])
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        read_wanted(body)


def test_what_the_router_cannot_tokenize_a_server_may() -> None:
    async def main() -> None:
        server = FakeServer()
        async with up(server), Upstream() as upstream:
            prompts = Prompts(Tokenizer(byte_level(), ChatTemplate(TEMPLATE, {}), "m"), upstream)
            wanted = read_wanted(msgspec.json.encode(asked("water", tools=TOOLS)))
            assert bytes(list(unpack(await prompts.tokens(wanted, 4096, server.url)))) == b"<user>water"

    run(main())
