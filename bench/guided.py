"""Guided decoding: what compiling a guide and masking a token cost, and a guided decode step against a free one.

The vocabulary is trained on the standard library's sources. Masks are those of walks through each guide that take a
random allowed token at a time. Where xgrammar is installed it does the same, as the reference. The model is a Llama of
22 M parameters, and more for its vocabulary, with random weights. Steps are wall time, all else is CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import sysconfig
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Protocol

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from report import Row, emit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils.logging import disable_progress_bar

from penstock.blocks import BlockId, Region
from penstock.engine.api import Past, Slice, Step
from penstock.engine.embedded import EmbeddedEngine, Options
from penstock.grammar import check, compile_guide
from penstock.request import Guide, Sampling

EOS = 0
PROMPT_TOKENS = 32
STEPS = 24

SMALL = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {
    "type": "object",
    "properties": {
        "location": {"type": "string", "description": "a city"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "array", "items": {"type": "string", "pattern": "^\\d{4}-\\d{2}-\\d{2}$"}, "maxItems": 7},
        "details": {
            "type": "object",
            "properties": {"wind": {"type": "boolean"}, "rain": {"type": ["number", "null"]}},
        },
    },
    "required": ["location"],
    "additionalProperties": False,
}


def nested(depth: int) -> dict[str, object]:
    """43 objects at depth 2."""
    if depth == 0:
        return SMALL
    return {"type": "object", "properties": {f"k{i}": nested(depth - 1) for i in range(6)}, "required": ["k0"]}


GUIDES = {
    "any JSON": Guide("json_object"),
    "schema of 2 properties": Guide("json_schema", json.dumps(SMALL)),
    "schema of a tool": Guide("json_schema", json.dumps(TOOL)),
    "schema of 43 objects": Guide("json_schema", json.dumps(nested(2))),
    "expression": Guide("regex", r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(Z|[+-]\d{2}:\d{2})"),
    "100 choices": Guide("choice", json.dumps([f"option {i}" for i in range(100)])),
    "grammar": Guide("grammar", 'root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"'),
}
# Within the limits on text, and made to be slow.
COSTLY = {
    "480 properties, 100 times": Guide(
        "json_schema",
        json.dumps(
            {
                "$defs": {"d": {"type": "object", "properties": {f"p{i}": True for i in range(480)}}},
                "allOf": [{"$ref": "#/$defs/d"}] * 100,
            }
        ),
    ),
    "3,000 items": Guide("json_schema", json.dumps({"type": "array", "prefixItems": [{"type": "integer"}] * 3000})),
    "nested repetition": Guide("regex", "((a{100}){100}){100}"),
    "2,000 optional rules": Guide("grammar", "root ::= " + "a? " * 2000 + '\na ::= "b"'),
}


class Walk(Protocol):
    """A matcher somewhere in a guide."""

    def mask(self) -> bytes: ...

    def accept(self, token: int) -> bool: ...


class Compiled(Protocol):
    def start(self) -> Walk: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="tokens")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    tokenizer = trained(arguments.vocabulary)
    rows = list(of_guides(tokenizer, 8 if arguments.quick else 100))
    rows += [
        Row(f"check: {name}", spent_ms(lambda guide=guide: check(guide, "x"), rounds=1), "ms")  # it remembers
        for name, guide in COSTLY.items()
    ]
    rows += asyncio.run(of_steps(tokenizer, 3 if arguments.quick else 9))
    emit(rows, arguments.json)


def trained(vocabulary: int) -> Tokenizer:
    """Byte-level BPE, from 200 characters for each token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sources(most_chars=200 * vocabulary), trainer)
    return tokenizer


def sources(most_chars: int) -> Iterator[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    Random(1).shuffle(files)
    for path in files:
        text = path.read_text("utf-8", errors="ignore")
        most_chars -= len(text)
        if most_chars < 0:
            return
        yield text


# Compiling and masking


def of_guides(tokenizer: Tokenizer, walks: int) -> Iterator[Row]:
    size = tokenizer.get_vocab_size()
    own = LLTokenizer(tokenizer.to_str(), eos_token=[EOS])
    yield Row(f"tokenizer of {size} tokens", spent_ms(lambda: LLTokenizer(tokenizer.to_str(), eos_token=[EOS])), "ms")
    sides: list[Callable[[Guide], Compiled]] = [lambda guide: Ours(compile_guide(guide, own))]
    if find_spec("xgrammar"):
        sides.append(theirs(tokenizer))
    compiling = {
        name: [spent_ms(lambda side=side, guide=guide: side(guide)) for side in sides] for name, guide in GUIDES.items()
    }
    masking = {name: [mask_us(side(guide), size, walks) for side in sides] for name, guide in GUIDES.items()}
    for what, unit, found in (("compile", "ms", compiling), ("mask", "us", masking)):
        for name, (ours, *reference) in found.items():
            yield Row(f"{what}: {name}", ours, unit, *("xgrammar", reference[0]) if reference else ())


class Ours:
    """Copies of one matcher, as the engine makes them."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.mask = matcher.compute_bitmask
        self.accept = matcher.consume_token

    def start(self) -> Ours:
        return Ours(self._matcher.deep_copy())


def theirs(tokenizer: Tokenizer) -> Callable[[Guide], Compiled]:
    import xgrammar

    names = [name for name, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    kind = xgrammar.VocabType.BYTE_LEVEL
    info = xgrammar.TokenizerInfo(names, kind, vocab_size=len(names), stop_token_ids=[EOS])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    compilers = {
        "json_object": lambda _: compiler.compile_builtin_json_grammar(),
        "json_schema": compiler.compile_json_schema,
        "regex": compiler.compile_regex,
        "choice": lambda text: compiler.compile_grammar("root ::= " + " | ".join(map(json.dumps, json.loads(text)))),
        "grammar": compiler.compile_grammar,
    }

    class Theirs:
        def __init__(self, guide: Guide) -> None:
            self._compiled = compilers[guide.kind](guide.text)

        def start(self) -> TheirWalk:
            return TheirWalk(xgrammar.GrammarMatcher(self._compiled))

    class TheirWalk:
        def __init__(self, matcher: xgrammar.GrammarMatcher) -> None:
            self._matcher = matcher
            self._words = xgrammar.allocate_token_bitmask(1, len(names))
            self.accept = matcher.accept_token

        def mask(self) -> bytes:
            self._matcher.fill_next_token_bitmask(self._words)
            return self._words.numpy().tobytes()

    return Theirs


def spent_ms(work: Callable[[], object], rounds: int = 5) -> float:
    """The median, of CPU time."""
    taken = []
    for _ in range(rounds):
        started_s = time.process_time()
        work()
        taken.append(time.process_time() - started_s)
    return 1e3 * statistics.median(taken)


def mask_us(compiled: Compiled, size: int, walks: int) -> float:
    """The mean CPU time, over walks of 40 tokens at most."""
    taken = []
    for walk in range(walks):
        matcher, random = compiled.start(), Random(walk)
        for _ in range(40):
            started_s = time.process_time()
            mask = matcher.mask()
            taken.append(time.process_time() - started_s)
            allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), count=size, bitorder="little"))
            token = int(allowed[random.randrange(len(allowed))])
            if token == EOS or not matcher.accept(token):
                break
    return 1e6 * statistics.fmean(taken)


# Whole steps


async def of_steps(tokenizer: Tokenizer, rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), tokenizer)
        async with EmbeddedEngine(Options(folder, device="cpu", threads=1)) as engine:
            bench = Bench(engine)
            rows = []
            for batch in (1, 8, 32):
                guided: list[float] = []
                free: list[float] = []
                for _ in range(rounds):
                    guided += await bench.decode(batch, "any JSON")
                    free += await bench.decode(batch, None)
                name = f"decode step of {batch}, guided"
                rows.append(Row(name, statistics.median(guided), "ms", "free", statistics.median(free)))
            return rows


def write_model(folder: Path, tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        eos_token_id=EOS,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


class Bench:
    def __init__(self, engine: EmbeddedEngine) -> None:
        layout = engine.info.layout
        self._each = layout.blocks_for(PROMPT_TOKENS + STEPS)
        blocks = 32 * self._each
        self._engine = engine
        self._region = Region("bench", 1, layout, blocks, memoryview(bytearray(blocks * layout.block_bytes)))
        self._names = iter(range(sys.maxsize))
        engine.attach(self._region)

    async def decode(self, batch: int, guide: str | None) -> list[float]:
        """Milliseconds of each step, sampled; the step that computes the prompts and compiles does not count."""
        sampling = Sampling(max_tokens=STEPS, guide=GUIDES[guide] if guide else None)
        pasts = [Past(f"s{next(self._names)}", array("I", [7] * PROMPT_TOKENS), PROMPT_TOKENS) for _ in range(batch)]
        tables = [[BlockId(b) for b in range(row * self._each, (row + 1) * self._each)] for row in range(batch)]
        parts = list(zip(pasts, tables, strict=True))
        await self._step([Slice(past.tokens[:], 0, table, sampling, past) for past, table in parts])
        taken = []
        for _ in range(STEPS):
            slices = [Slice(past.tokens[-1:], len(past.tokens) - 1, table, sampling, past) for past, table in parts]
            started_s = time.perf_counter()
            await self._step(slices)
            taken.append(1e3 * (time.perf_counter() - started_s))
        return taken

    async def _step(self, slices: list[Slice]) -> None:
        for part, token in zip(slices, await self._engine.step(Step(self._region, slices)), strict=True):
            part.past.tokens.append(token.id)


if __name__ == "__main__":
    main()
