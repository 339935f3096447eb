"""Encoding piece by piece, remembered and in a thread: the tokens are the codec's, and nothing is encoded twice."""

from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import PromptTooLong
from penstock.serve import encoder
from penstock.serve.encoder import Codec, Encoder, fast_codec, find_difference, plain_codec, samples
from penstock.serve.pieces import cutter_of
from penstock.tokens import Tokens, pack
from tests.serve.tokenizers_made import TEXT, byte_level, sentencepiece
from tests.support import run

T = TypeVar("T")

TURNS = [f"<|user|>{TEXT} ({turn})</s><|assistant|>{TEXT[::-1]} ({turn})</s>" for turn in range(5)]


class Counting:
    """A codec that notes what it had to encode."""

    def __init__(self, codec: tokenizers.Tokenizer) -> None:
        self.texts: list[str] = []
        self._encode = plain_codec(codec).encode

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        self.texts += texts
        return self._encode(texts)


def made(codec: tokenizers.Tokenizer, **options: object) -> tuple[Encoder, Counting]:
    counting = Counting(codec)
    return Encoder(Codec(counting, inline_chars=1000), cutter_of(codec), **options), counting


def plain(codec: tokenizers.Tokenizer, text: str) -> list[int]:
    return codec.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("codec", [byte_level(), sentencepiece()], ids=["byte level", "sentencepiece"])
@given(asked=st.lists(st.lists(st.sampled_from([*TURNS, "a", "<s>"]), max_size=6).map("".join), max_size=6))
def test_whatever_is_remembered_the_tokens_are_the_codecs(codec: tokenizers.Tokenizer, asked: list[str]) -> None:
    remembering, _ = made(codec, cache_bytes=6000)  # a few turns
    for text in asked:
        assert list(run(remembering.encode(text, 10_000))) == plain(codec, text)


def test_of_a_conversation_only_the_new_turn_is_encoded() -> None:
    remembering, counting = made(byte_level())
    for turns in range(1, 6):
        counting.texts.clear()
        run(remembering.encode("".join(TURNS[:turns]), 10_000))
        assert len("".join(counting.texts)) <= len(TURNS[0]) + len("</s>") * 2
        assert f"({turns - 1})" in "".join(counting.texts)


def test_what_is_remembered_is_bounded_and_the_oldest_goes() -> None:
    remembering, counting = made(byte_level(), cache_bytes=5000)
    texts = [f"{number} {TEXT}" for number in range(20)]
    for text in texts:
        run(remembering.encode(text, 10_000))
    counting.texts.clear()
    run(remembering.encode(texts[-1], 10_000))
    assert counting.texts == []
    run(remembering.encode(texts[0], 10_000))
    assert "".join(counting.texts) == texts[0]


def test_a_piece_that_comes_twice_is_encoded_once() -> None:
    remembering, counting = made(byte_level())
    tokens = run(remembering.encode(TURNS[0] * 3, 10_000))
    assert list(tokens) == plain(byte_level(), TURNS[0] * 3)
    assert len("".join(counting.texts)) <= 2 * len(TURNS[0])


def test_the_tokens_are_the_callers_to_change() -> None:
    remembering, _ = made(byte_level())
    run(remembering.encode(TEXT, 10_000)).append(7)
    assert list(run(remembering.encode(TEXT, 10_000))) == plain(byte_level(), TEXT)


def test_only_what_is_long_leaves_the_loop() -> None:
    sent: list[int] = []

    async def offload(work: Callable[[], list[Tokens]]) -> list[Tokens]:
        sent.append(len(counting.texts))
        await asyncio.sleep(0)
        return work()

    remembering, counting = made(byte_level(), offload=offload)
    long = TEXT * 200

    async def both() -> list[Tokens]:
        return await asyncio.gather(remembering.encode(long, 100_000), remembering.encode(long, 100_000))

    assert [list(tokens) for tokens in run(both())] == [plain(byte_level(), long)] * 2
    run(remembering.encode(TEXT, 100_000))
    run(remembering.encode(long, 100_000))  # is remembered
    assert sent == [0, 0]


def test_what_is_very_long_is_cut_elsewhere() -> None:
    sent: list[object] = []

    async def offload(work: Callable[[], T]) -> T:
        sent.append(result := work())
        return result

    remembering, _ = made(byte_level(), offload=offload)
    text = "<s>" * (encoder.INLINE_CUT_CHARS // 3 + 1)
    assert list(run(remembering.encode(text, len(text)))) == [0] * (len(text) // 3)
    assert sent[0] == cutter_of(byte_level()).cut(text)


def test_too_much_is_given_up_early() -> None:
    remembering, counting = made(byte_level())
    with pytest.raises(PromptTooLong, match="more than 1000 tokens"):
        run(remembering.encode(TEXT * 1000, 1000))
    assert len("".join(counting.texts)) < len(TEXT * 1000) / 4


def test_too_much_without_a_cut_is_given_up_early() -> None:
    remembering, counting = made(byte_level())
    with pytest.raises(PromptTooLong, match="more than 1000 tokens"):
        run(remembering.encode("x" * 1_000_000, 1000))
    assert max(map(len, counting.texts)) <= encoder.GROUP_CHARS


# Another library


class Fake:
    """Stands for fastokens: as the real one, or wrong about one of `wrong`."""

    def __init__(self, codec: tokenizers.Tokenizer, wrong: str) -> None:
        self._codec = codec
        self._wrong = wrong

    def encode_batch_flat(self, texts: list[str]) -> tuple[bytes, bytes]:
        (text,) = texts
        return pack(plain(self._codec, text.replace(self._wrong, "a"))), b""


def install(monkeypatch: pytest.MonkeyPatch, read: Callable[[str], object]) -> None:
    module = types.SimpleNamespace(Tokenizer=types.SimpleNamespace(from_json_str=read))
    monkeypatch.setitem(sys.modules, "fastokens", module)


def test_a_quicker_codec_is_used_where_it_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda text: Fake(tokenizers.Tokenizer.from_str(text), "never there"))
    codec = fast_codec(byte_level())
    assert codec is not None
    assert list(codec.encode([TEXT, "a"])[0]) == plain(byte_level(), TEXT)


@pytest.mark.parametrize("wrong", ["e\u0301", "<0x0A>", "<|user|>", "\r\n\r\n", "'LL", "ater"])
def test_it_is_not_where_it_differs(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    install(monkeypatch, lambda text: Fake(tokenizers.Tokenizer.from_str(text), wrong))
    assert fast_codec(byte_level()) is None


def test_it_is_not_where_it_cannot_read_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(text: str) -> object:
        raise ValueError("unsupported pre-tokenizer")

    install(monkeypatch, refuse)
    assert fast_codec(byte_level()) is None


def test_it_is_not_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert fast_codec(byte_level()) is None


def test_the_real_one_agrees_on_bytes() -> None:
    pytest.importorskip("fastokens")
    codec = fast_codec(byte_level())
    assert codec is not None
    assert (
        find_difference(plain_codec(byte_level()).encode, codec.encode, [TEXT, *TURNS, *samples(sentencepiece())])
        is None
    )


def test_the_real_one_takes_text_for_bytes_and_is_not_used() -> None:
    pytest.importorskip("fastokens")
    assert fast_codec(sentencepiece()) is None
