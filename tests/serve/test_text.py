"""A model's folder makes a tokenizer, and texts and conversations the tokens that the model was made with."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from tokenizers import Tokenizer as Codec
from tokenizers import processors

from penstock.errors import BadRequest, PromptTooLong, UnreadableModel
from penstock.serve.chat_template import Chat
from penstock.serve.text import Tokenizer, load_tokenizer
from tests.serve.tokenizers_made import TEXT, byte_level, write_folder
from tests.support import run


@pytest.mark.parametrize("at_most", [1, 100, 5000])
def test_long_texts_are_refused(at_most: int) -> None:
    tokenizer = Tokenizer(byte_level(), None, "m")
    with pytest.raises(PromptTooLong, match=f"more than {at_most} tokens"):
        run(tokenizer.encode_text(TEXT * 400, at_most))


def test_what_fits_is_not_refused_however_long_its_words() -> None:
    codec = Codec.from_str(byte_level().to_str())
    codec.add_tokens(["accelerators"])
    tokenizer = Tokenizer(codec, None, "m")
    assert run(tokenizer.encode_text("accelerators" * 6000, 6000)) == array(
        "I", [codec.token_to_id("accelerators")] * 6000
    )


T = TypeVar("T")

TEMPLATE = processors.TemplateProcessing("<s> <s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])


@pytest.mark.parametrize(
    "processor",
    [
        TEMPLATE,
        processors.TemplateProcessing("$A", special_tokens=[]),
        processors.ByteLevel(),
        processors.Sequence([processors.ByteLevel(), TEMPLATE]),
        processors.BertProcessing(("</s>", 1), ("<s>", 0)),
        processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
    ],
)
@pytest.mark.parametrize("text", ["", "water", "<s>water</s>"])
def test_texts_have_the_special_tokens_around_them_that_the_tokenizer_puts(
    processor: processors.PostProcessor, text: str
) -> None:
    codec = Codec.from_str(byte_level().to_str())
    codec.post_processor = processor
    tokenizer = Tokenizer(codec, None, "m")
    for add_special_tokens in (True, False):
        expected = codec.encode(text, add_special_tokens=add_special_tokens).ids
        assert list(run(tokenizer.encode_text(text, 100, add_special_tokens))) == expected
        assert list(tokenizer.encode_text_nowait(text, add_special_tokens)) == expected


def test_a_folder_gives_tokenizer_and_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, byte_level()), "m")
    tokens = run(tokenizer.encode_chat(Chat([{"role": "user", "content": "water"}]), 100))
    assert byte_level().decode(tokens, skip_special_tokens=False) == "<|user|>water</s><|assistant|>"
    assert tokenizer.vocab_size == byte_level().get_vocab_size()


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    codec = Codec.from_str(byte_level().to_str())
    codec.enable_truncation(2)
    codec.enable_padding(length=50)
    tokenizer = load_tokenizer(write_folder(tmp_path, codec), "m")
    tokens = run(tokenizer.encode_text("prompts to accelerators", 100))
    assert list(tokens) == byte_level().encode("prompts to accelerators").ids


def test_no_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UnreadableModel, match=r"has no tokenizer\.json; save one"):
        load_tokenizer(tmp_path, "m")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnreadableModel, match="is no tokenizer"):
        load_tokenizer(tmp_path, "m")


@pytest.mark.parametrize("content", ["[1]", "{"])
def test_a_broken_configuration_is_one_line(tmp_path: Path, content: str) -> None:
    write_folder(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UnreadableModel, match=r"tokenizer_config\.json is not"):
        load_tokenizer(tmp_path, "m")


def test_without_a_template_chat_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, byte_level(), {}), "m")
    with pytest.raises(BadRequest, match="no chat template; use /v1/completions"):
        run(tokenizer.encode_chat(Chat([{"role": "user", "content": "water"}]), 100))


def test_long_conversations_are_rendered_elsewhere(tmp_path: Path) -> None:
    texts: list[object] = []

    async def offload(work: Callable[[], T]) -> T:
        result = work()
        texts.append(result)
        return result

    tokenizer = load_tokenizer(write_folder(tmp_path, byte_level()), "m", offload)
    run(tokenizer.encode_chat(Chat([{"role": "user", "content": "a"}] * 256), 10_000))
    assert texts == []
    run(tokenizer.encode_chat(Chat([{"role": "user", "content": "a"}] * 257), 10_000))
    assert texts == ["<|user|>a</s>" * 257 + "<|assistant|>"]


def test_the_templates_own_file_wins_and_lists_have_a_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}listed"}]
    config = {"bos_token": "<s>", "add_bos_token": True, "chat_template": named}
    folder = write_folder(tmp_path, byte_level(), config)
    tokens = run(load_tokenizer(folder, "m").encode_chat(Chat([]), 100))
    assert byte_level().decode(tokens, skip_special_tokens=False) == "<s>listed"
    (folder / "chat_template.jinja").write_text("own file")
    assert byte_level().decode(run(load_tokenizer(folder, "m").encode_chat(Chat([]), 100))) == "own file"


def test_special_tokens_may_have_a_file_of_their_own(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, byte_level(), {"chat_template": "{{ eos_token }}"})
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    tokens = run(load_tokenizer(folder, "m").encode_chat(Chat([]), 100))
    assert list(tokens) == byte_level().encode("</s>").ids
