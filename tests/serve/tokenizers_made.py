"""Tiny tokenizers of the two families, made on the spot."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = """A penstock brings water to the turbine; this one brings prompts to accelerators. Prefill and decode run on
separate workers. Grüße, naïve café, 東京タワー, 😀👍🏽, שלום. def f(x):\n    return [x, 'y'] * 2\n"""
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def byte_level() -> Tokenizer:
    """As of GPT-2, Llama 3, Qwen; with an added token that is not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([AddedToken("<a tool>", special=False), AddedToken("Ġx", special=False)])
    return tokenizer


@cache
def sentencepiece() -> Tokenizer:
    """As of Llama 2 and Mistral: words with a mark for the space before them, and bytes for the rest."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.train_from_iterator([TEXT[:120]], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(words.to_str())["model"]
    names = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(merge) for merge in model["merges"]]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return tokenizer


def write_folder(folder: Path, tokenizer: Tokenizer, config: dict[str, object] | None = None) -> Path:
    """A model folder as far as text is concerned."""
    tokenizer.save(str(folder / "tokenizer.json"))
    defaults = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(defaults if config is None else config))
    return folder
