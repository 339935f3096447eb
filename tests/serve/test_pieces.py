"""Cutting a text changes no token, for tokenizers of every family; where that is not known, nothing is cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Codec

from penstock.serve import pieces
from penstock.serve.pieces import Cutter, cutter_of
from tests.serve.tokenizers_made import SPECIAL, TEXT, byte_level, sentencepiece

SPLITS = sorted(pieces._PATTERNS)
WORDS = [pattern for pattern in SPLITS if pattern.endswith(pieces._SPACES)]


def split_by(*patterns: str) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@cache
def bpe(splits: tuple[str, ...], **options: bool) -> Codec:
    codec = Codec(models.BPE(**options))
    codec.pre_tokenizer = split_by(*splits) if splits else pre_tokenizers.ByteLevel(add_prefix_space=True)
    codec.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    codec.train_from_iterator([TEXT * 2, "a b c the the  \n\n  x y 123 4567 's 'll don't"], trainer)
    codec.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<think>", normalized=True)])
    return codec


def changed(codec: Codec, **parts: object) -> Codec:
    made = Codec.from_str(codec.to_str())
    for name, part in parts.items():
        setattr(made, name, part)
    return made


FAMILIES: dict[str, Callable[[], Codec]] = {
    "gpt 2": byte_level,
    "gpt 2 with a space before": lambda: bpe(()),
    **{f"pattern {index}": lambda pattern=pattern: bpe((pattern,)) for index, pattern in enumerate(WORDS)},
    "deepseek": lambda: bpe(tuple(sorted(SPLITS, key=len)[:2] + [one for one in WORDS if r"\p{S}" in one])),
    "llama 3": lambda: bpe((WORDS[0],), ignore_merges=True),
    "qwen": lambda: changed(bpe((WORDS[0],)), normalizer=normalizers.NFC()),
    "digits": lambda: changed(
        bpe(()), pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel()])
    ),
    "llama 2": sentencepiece,
    "gemma": lambda: changed(sentencepiece(), normalizer=normalizers.Replace(" ", "▁")),
    "metaspace": lambda: changed(sentencepiece(), normalizer=None, pre_tokenizer=pre_tokenizers.Metaspace()),
    "metaspace first": lambda: changed(
        sentencepiece(), normalizer=None, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    ),
    "overlapping": lambda: overlapping(),
    "rewriting": lambda: changed(bpe((WORDS[0],)), normalizer=normalizers.Replace("a<", "ab")),
    "stripping": lambda: changed(bpe((WORDS[0],)), normalizer=normalizers.Strip()),
    **{flag: lambda flag=flag: looking_around(**{flag: True}) for flag in ("lstrip", "rstrip", "single_word")},
    "lowercase": lambda: changed(bpe((WORDS[0],)), normalizer=normalizers.Lowercase()),
}


def looking_around(**flag: bool) -> Codec:
    codec = changed(bpe((WORDS[0],)))
    codec.add_tokens([AddedToken("</s", normalized=False, **flag), AddedToken("<|us", normalized=False, **flag)])
    return codec


@cache
def overlapping() -> Codec:
    codec = changed(bpe((WORDS[0],)))
    codec.add_special_tokens(["<s", "<s></s>", ">a", "s> b"])
    codec.add_tokens([AddedToken("</s><", normalized=True), AddedToken("a<s", normalized=True)])
    return codec


GROUPS = {  # what might be mistaken for each other, or meets across a cut
    "tokens": ["<s>", "<s", "s>", "</s>", "<|user|>", "<|us", "<tool>", "<think>", ">", "a", "b", " b", " "],
    "words in tokens": ["<a tool>", "a tool", "a", " ", "tool", ">a b", "s> b", "b", "<s>", "Ġx", "x"],
    "spaces": [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n", "\u00a0", "\u3000", "a", "The", "!", "1"],
    "words": ["a", "b", "the", "The", "I'm", "'s", "'S b", "\u017f", "\u212a", " ", "1", "1234", "!", "...", "/", "_"],
    "marks": ["e\u0301", "\u0301", "\u0345", "\u200d", "é", "a", "b", " ", "A"],
    "scripts": ["タ", "東京", "😀", "▁", "▁a", "<0x0A>", "שלום", "a", " ", "<s>"],
}
SCRAPS = [scrap for group in GROUPS.values() for scrap in group]
anything = st.lists(st.sampled_from(SCRAPS) | st.characters(codec="utf-8"), max_size=40)
of_a_group = st.sampled_from(list(GROUPS.values())).flatmap(lambda group: st.lists(st.sampled_from(group), max_size=20))
texts = (anything | of_a_group).map("".join)


def encode(codec: Codec, parts: Sequence[str]) -> list[int]:
    batches = codec.encode_batch_fast(list(parts), add_special_tokens=False)
    return [token for batch in batches for token in batch.ids]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cut that is safe is made."""
    monkeypatch.setattr(pieces, "PIECE_CHARS", 1)
    monkeypatch.setattr(pieces, "STRETCH_CHARS", 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_pieces_have_the_tokens_of_the_whole(name: str) -> None:
    codec = FAMILIES[name]()
    cutter = cutter_of(codec)

    def check(text: str) -> None:
        parts = cutter.cut(text)
        assert "".join(parts) == text
        assert encode(codec, parts) == encode(codec, [text])

    for group in GROUPS.values():
        for pair in product(group, repeat=2):
            check("".join(pair))
    given(texts)(check)()


# What is cut


def test_conversations_are_cut_before_special_tokens() -> None:
    text = "<s><|user|>two words</s><|assistant|>"
    assert cutter_of(sentencepiece()).cut(text) == ["<s>", "<|user|>two words", "</s>", "<|assistant|>"]


def test_tokens_that_are_looked_for_second_are_cut_at_without_a_normalizer() -> None:
    codec = bpe((WORDS[0],))
    assert cutter_of(codec).cut("ab<think>cd</s>") == ["ab", "<think>cd", "</s>"]
    assert cutter_of(changed(codec, normalizer=normalizers.Sequence([]))) == cutter_of(codec)
    assert cutter_of(changed(codec, normalizer=normalizers.NFC())).cut("ab<think>cd</s>") == ["ab<think>cd", "</s>"]


def test_long_stretches_are_cut_before_a_space() -> None:
    assert cutter_of(bpe((WORDS[0],))).cut("two words\nx 1  y") == ["two", " words\nx", " 1  y"]


def test_texts_that_begin_alike_are_cut_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARS", 10)
    monkeypatch.setattr(pieces, "STRETCH_CHARS", 30)
    cutter = cutter_of(bpe((WORDS[0],)))
    text = "<s>so it goes on and on, line after line</s>\n" * 9
    cuts = [cutter.cut(text[:end]) for end in range(0, len(text), 7)]
    assert all(later[: len(earlier) - 1] == earlier[:-1] for earlier, later in pairwise(cuts))
    assert len(cuts[-1]) > 9


def test_short_pieces_are_not_worth_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARS", 10)
    assert cutter_of(byte_level()).cut("<s>a</s>b<s>abcdefgh</s>") == ["<s>a</s>b<s>abcdefgh", "</s>"]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("lstrip", "rstrip", "single_word")])
def test_every_other_family_is_cut_somewhere(name: str) -> None:
    assert len(cutter_of(FAMILIES[name]()).cut("<s>a</s>b<|user|>")) > 2


@given(
    st.lists(st.sampled_from([*SPECIAL, "<tool>", "<think>", "<", "a", " ", "\n", "bc " * 9, "x" * 50]), max_size=99)
)
def test_a_text_is_cut_alike_however_much_is_searched_at_a_time(parts: list[str]) -> None:
    text, cutter = "".join(parts), cutter_of(bpe((WORDS[0],)))
    whole = cutter.cut(text)
    for chars in (2, 3, 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "SEARCH_CHARS", chars)
            assert cutter.cut(text) == whole


# What is not

UNCUT = Cutter(None, None, False)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_nothing_is_cut_beside_tokens_that_look_around(flag: str) -> None:
    assert cutter_of(looking_around(**{flag: True})) == UNCUT


def test_nothing_is_cut_where_chance_decides() -> None:
    raw = json.loads(byte_level().to_str())
    raw["model"]["dropout"] = 0.1
    assert cutter_of(Codec.from_str(json.dumps(raw))) == UNCUT


def test_stretches_are_whole_where_it_is_not_known_what_splits_them() -> None:
    known = cutter_of(bpe((WORDS[0],)))
    unknown = [
        bpe((r"\S+\s*",)),
        changed(bpe((WORDS[0],)), normalizer=normalizers.NFKC()),
        changed(byte_level(), pre_tokenizer=pre_tokenizers.ByteLevel(use_regex=False)),
        bpe((r"\p{N}{1,3}",)),
    ]
    assert [cutter_of(codec).is_split_at_spaces for codec in unknown] == [False] * 4
    assert known.is_split_at_spaces
    codec = changed(bpe((WORDS[0],)))
    codec.add_tokens(["a tool"])
    spoken = cutter_of(codec)
    assert not spoken.is_split_at_spaces
    assert spoken.cut("is a tool <s>") == ["is ", "a tool ", "<s>"]
    assert replace(known, is_split_at_spaces=False).cut("two words") == ["two words"]
