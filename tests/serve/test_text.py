"""Text to tokens and back: nothing is lost, repeated or shown too early."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Codec
from tokenizers import decoders

from penstock.errors import BadRequest, PromptTooLong, SetupError, UnreadableModel, UnsupportedModel
from penstock.serve.text import ChatTemplate, Output, StopFinder, Tokenizer, load_tokenizer
from tests.serve.tokenizers_made import CHAT, TEXT, byte_level, sentencepiece, write_folder

DECODERS: dict[str, Callable[[], decoders.Decoder]] = {
    "llama": lambda: sentencepiece().decoder,
    "gemma": lambda: decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "t5": decoders.Metaspace,
    "never": lambda: decoders.Metaspace(prepend_scheme="never"),
}


def with_decoder(name: str) -> Codec:
    codec = Codec.from_str(sentencepiece().to_str())
    codec.decoder = DECODERS[name]()
    return codec


def streamed(output: Output, tokens: list[int]) -> str:
    return "".join([*map(output.push, tokens), output.finish()])


byte_level_ids = st.lists(st.integers(0, byte_level().get_vocab_size() + 2), max_size=40)
sentencepiece_ids = st.lists(st.integers(0, sentencepiece().get_vocab_size() + 2), max_size=40)
texts = st.text(st.characters(codec="utf-8"), max_size=40)


# Detokenizer


@given(byte_level_ids)
def test_byte_level_pieces_make_the_whole(tokens: list[int]) -> None:
    codec = byte_level()
    assert streamed(Tokenizer(codec, None, "m").output(), tokens) == codec.decode(tokens)


@pytest.mark.parametrize("name", DECODERS)
@given(tokens=sentencepiece_ids)
def test_sentencepiece_pieces_make_the_whole(name: str, tokens: list[int]) -> None:
    codec = with_decoder(name)
    whole = codec.decode(tokens)
    assume("\ufffd" not in whole)
    assert streamed(Tokenizer(codec, None, "m").output(), tokens) == whole


@given(sentencepiece_ids)
def test_broken_byte_runs_show_what_is_valid_in_them(tokens: list[int]) -> None:
    codec = sentencepiece()
    parts = [codec.id_to_token(token) for token in tokens]
    words = [part for token, part in zip(tokens, parts, strict=True) if part and token > 4]
    expected = b"".join(
        bytes([int(word[3:5], 16)]) if word.startswith("<0x") else word.replace("▁", " ").encode() for word in words
    )
    text = streamed(Tokenizer(codec, None, "m").output(is_continuation=True), tokens)
    assert text == expected.decode(errors="replace")


@pytest.mark.parametrize("codec", [byte_level(), sentencepiece()], ids=["byte level", "sentencepiece"])
@given(text=texts)
def test_text_survives_the_round_trip(codec: Codec, text: str) -> None:
    assume("▁" not in text and "<" not in text)
    tokenizer = Tokenizer(codec, None, "m")
    assert streamed(tokenizer.output(), tokenizer.encode_text(text, 1000)) == text


def test_characters_come_whole() -> None:
    tokenizer = Tokenizer(byte_level(), None, "m")
    tokens = [byte_level().token_to_id(name) for name in ("ð", "Ł", "ĺ", "Ģ")]  # one smiley, byte by byte
    output = tokenizer.output()
    assert [output.push(token) for token in tokens] == ["", "", "", "😀"]
    assert output.finish() == ""
    assert [output.push(tokens[0]), output.finish()] == ["", "\ufffd"]


def test_a_continuation_keeps_its_first_space() -> None:
    tokenizer = Tokenizer(sentencepiece(), None, "m")
    tokens = tokenizer.encode_text("water", 1000)
    assert streamed(tokenizer.output(), tokens) == "water"
    assert streamed(tokenizer.output(is_continuation=True), tokens) == " water"


def test_tokens_are_spelled_in_bytes() -> None:
    tokenizer = Tokenizer(byte_level(), None, "m")
    assert tokenizer.spell(byte_level().token_to_id("</s>")) == b"</s>"
    assert tokenizer.spell(byte_level().token_to_id("<a tool>")) == b"<a tool>"
    assert tokenizer.spell(byte_level().token_to_id("ð")) == b"\xf0"
    assert tokenizer.spell(10**6) == b""
    words = Tokenizer(sentencepiece(), None, "m")
    assert words.spell(sentencepiece().token_to_id("<0x0A>")) == b"\n"
    assert words.spell(sentencepiece().token_to_id("▁")) == b" "


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.BPEDecoder(), decoders.Metaspace("_")])
def test_other_decoders_are_refused(decoder: decoders.Decoder | None) -> None:
    codec = Codec.from_str(byte_level().to_str())
    codec.decoder = decoder
    with pytest.raises(UnsupportedModel, match=r"'m' decodes by .*; penstock can stream"):
        Tokenizer(codec, None, "m")


# Stop strings

pieces = st.lists(st.text("ab", max_size=4), max_size=12)
stop_strings = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


@given(pieces, stop_strings)
def test_text_ends_before_the_first_stop_string(parts: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    shown = ""
    read = ""
    for part in parts:
        shown += finder.push(part)
        read += part
        starts = [read.find(stop) for stop in stops if stop in read]
        assert bool(finder.found) == bool(starts)
        if finder.found:
            assert shown == read[: min(starts)]
            return
        held = read.removeprefix(shown)
        assert held == "" or any(stop.startswith(held) for stop in stops), "held back for nothing"
    assert shown + finder.finish() == read


def test_output_stops() -> None:
    tokenizer = Tokenizer(byte_level(), None, "m")
    output = tokenizer.output(StopFinder(["turbine"]))
    shown = "".join(output.push(token) for token in tokenizer.encode_text("the turb, the turbine; this", 99))
    assert shown == "the turb, the "
    assert output.stopped_by == "turbine"
    assert output.finish() == ""


def test_held_back_text_comes_at_the_end() -> None:
    tokenizer = Tokenizer(byte_level(), None, "m")
    output = tokenizer.output(StopFinder(["turbine"]))
    shown = "".join(output.push(token) for token in tokenizer.encode_text("the turb", 99))
    assert (shown, output.finish(), output.stopped_by) == ("the ", "turb", "")


# Sizes


@pytest.mark.parametrize("at_most", [1, 100, 5000])
def test_long_texts_are_refused(at_most: int) -> None:
    tokenizer = Tokenizer(byte_level(), None, "m")
    with pytest.raises(PromptTooLong, match=f"more than {at_most} tokens"):
        tokenizer.encode_text(TEXT * 400, at_most)


def test_what_fits_is_not_refused_however_long_its_words() -> None:
    codec = Codec.from_str(byte_level().to_str())
    codec.add_tokens(["accelerators"])
    tokenizer = Tokenizer(codec, None, "m")
    assert tokenizer.encode_text("accelerators" * 6000, 6000) == [codec.token_to_id("accelerators")] * 6000


# Folders and templates


def test_a_folder_gives_tokenizer_and_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, byte_level()), "m")
    tokens = tokenizer.encode_chat([{"role": "user", "content": "water"}], 100)
    assert byte_level().decode(tokens, skip_special_tokens=False) == "<|user|>water</s><|assistant|>"
    assert tokenizer.vocab_size == byte_level().get_vocab_size()


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    codec = Codec.from_str(byte_level().to_str())
    codec.enable_truncation(2)
    codec.enable_padding(length=50)
    tokenizer = load_tokenizer(write_folder(tmp_path, codec), "m")
    assert tokenizer.encode_text("prompts to accelerators", 100) == byte_level().encode("prompts to accelerators").ids


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
        tokenizer.encode_chat([{"role": "user", "content": "water"}], 100)


def test_the_templates_own_file_wins_and_lists_have_a_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}listed"}]
    config = {"bos_token": "<s>", "add_bos_token": True, "chat_template": named}
    folder = write_folder(tmp_path, byte_level(), config)
    tokens = load_tokenizer(folder, "m").encode_chat([], 100)
    assert byte_level().decode(tokens, skip_special_tokens=False) == "<s>listed"
    (folder / "chat_template.jinja").write_text("own file")
    assert byte_level().decode(load_tokenizer(folder, "m").encode_chat([], 100)) == "own file"


def test_special_tokens_may_have_a_file_of_their_own(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, byte_level(), {"chat_template": "{{ eos_token }}"})
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert load_tokenizer(folder, "m").encode_chat([], 100) == byte_level().encode("</s>").ids


def test_templates_have_what_transformers_gives_them() -> None:
    source = """
    {%- for message in messages %}
        {% if loop.index > 2 %}{% break %}{% endif %}
        {% generation %}[{{ message | tojson }}]{% endgeneration %}
    {% endfor %}
{{ strftime_now("%Y") | length }}{{ bos_token }}"""
    messages = [{"role": "user", "content": "<é>"}] * 3
    shown = '[{"role": "user", "content": "<é>"}]'
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(messages) == f"{shown}{shown}4<s>"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.missing.more }}", "has no attribute"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate"),
        ("{{ messages.__class__.__mro__ }}", "is unsafe"),
        ("{{ messages.append(1) }}", "is not safely callable|unsafe"),
    ],
)
def test_what_a_template_raises_is_the_clients_to_know(source: str, problem: str) -> None:
    with pytest.raises(BadRequest, match=problem) as caught:
        ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}])
    assert caught.value.param == "messages"


def test_a_template_that_does_not_parse_stops_the_start() -> None:
    with pytest.raises(SetupError, match="does not parse"):
        ChatTemplate("{% for %}", {})


def test_the_template_agrees_with_transformers() -> None:
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "system", "content": " a "}, {"role": "user", "content": "<b>\n"}]
    expected, _ = chat_template_utils.render_jinja_template([messages], chat_template=CHAT, add_generation_prompt=True)
    assert ChatTemplate(CHAT, {}).render(messages) == expected[0]
