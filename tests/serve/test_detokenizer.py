"""Tokens into text: nothing is lost, repeated or shown too early."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Codec
from tokenizers import decoders

from penstock.errors import UnsupportedModel
from penstock.serve.detokenizer import Output
from penstock.serve.stop_strings import StopFinder
from penstock.serve.text import Tokenizer
from tests.serve.tokenizers_made import byte_level, sentencepiece
from tests.support import run

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


def streamed(output: Output, tokens: Iterable[int]) -> str:
    return "".join([*map(output.push, tokens), output.finish()])


byte_level_ids = st.lists(st.integers(0, byte_level().get_vocab_size() + 2), max_size=40)
sentencepiece_ids = st.lists(st.integers(0, sentencepiece().get_vocab_size() + 2), max_size=40)
texts = st.text(st.characters(codec="utf-8"), max_size=40)


@pytest.mark.parametrize("shows_special", [False, True])
@given(tokens=byte_level_ids)
def test_byte_level_pieces_make_the_whole(shows_special: bool, tokens: list[int]) -> None:
    codec = byte_level()
    output = Tokenizer(codec, None, "m").output(shown=None if shows_special else ())
    assert streamed(output, tokens) == codec.decode(tokens, skip_special_tokens=not shows_special)


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
    assert streamed(tokenizer.output(), run(tokenizer.encode_text(text, 1000))) == text


def test_characters_come_whole() -> None:
    tokenizer = Tokenizer(byte_level(), None, "m")
    tokens = [byte_level().token_to_id(name) for name in ("ð", "Ł", "ĺ", "Ģ")]  # one smiley, byte by byte
    output = tokenizer.output()
    assert [output.push(token) for token in tokens] == ["", "", "", "😀"]
    assert output.finish() == ""
    assert [output.push(tokens[0]), output.finish()] == ["", "\ufffd"]


def test_a_continuation_keeps_its_first_space() -> None:
    tokenizer = Tokenizer(sentencepiece(), None, "m")
    tokens = run(tokenizer.encode_text("water", 1000))
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


def test_output_stops() -> None:
    tokenizer = Tokenizer(byte_level(), None, "m")
    output = tokenizer.output(StopFinder(["turbine"]))
    shown = "".join(output.push(token) for token in run(tokenizer.encode_text("the turb, the turbine; this", 99)))
    assert shown == "the turb, the "
    assert output.stopped_by == "turbine"
    assert output.finish() == ""


def test_held_back_text_comes_at_the_end() -> None:
    tokenizer = Tokenizer(byte_level(), None, "m")
    output = tokenizer.output(StopFinder(["turbine"]))
    shown = "".join(output.push(token) for token in run(tokenizer.encode_text("the turb", 99)))
    assert (shown, output.finish(), output.stopped_by) == ("the ", "turb", "")
