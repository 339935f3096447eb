"""What it costs to make tokens of a prompt that is new, one turn longer or after a known system prompt; and the stalls.

CPU time of this process for each request, template included, the least of several rounds, beside the tokenizers library
encoding the whole text in the same run; and the same with fastokens, where that is installed. Prompts have 4,000 tokens
in eight turns and a system prompt: words that are one token each. A stall is by how much the event loop is late for a
timer of 1 ms; the longest one, while a request of 100,000 tokens is read, encoded in a thread and packed for a worker,
stands beside that of as long a time with nothing to do. Of several rounds the least, since others use this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

import msgspec
import tokenizers
from frontend import make_model
from report import Row, emit

from penstock.serve.asks import parse_chat
from penstock.serve.chat_template import Chat, ChatTemplate, load_template
from penstock.serve.encoder import Codec, fast_codec, plain_codec
from penstock.serve.intake import encode_prompts
from penstock.serve.text import Tokenizer
from penstock.tokens import pack

T = TypeVar("T")

TOKENS = 4_000
TURNS = 8
LONG_TOKENS = 100_000
MOST_TOKENS = 1 << 20
STALL_MS = 5.0
TIMER_S = 0.001
SEEN = {"new": 0, "one turn longer": 2 * TURNS - 1, "after a known system prompt": 1}  # messages, before the request

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Texts:
    """What all rows share: a model's tokenizer and template, and words of one token each."""

    tokenizer: tokenizers.Tokenizer
    template: ChatTemplate
    words: Sequence[str]
    pool: ThreadPoolExecutor

    def fresh(self, codec: Codec) -> Tokenizer:
        """A new one, which remembers nothing."""

        def offload(work: Callable[[], T]) -> Awaitable[T]:
            return asyncio.get_running_loop().run_in_executor(self.pool, work)

        return Tokenizer(self.tokenizer, self.template, "bench", codec, offload)

    def conversation(self, rng: Random) -> Messages:
        """A system prompt, and turns that end with the user's."""
        roles = ["system", *["user", "assistant"] * TURNS][:-1]
        each = TOKENS // len(roles)
        return [{"role": role, "content": " " + " ".join(rng.choices(self.words, k=each))} for role in roles]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        words = make_model(Path(folder))
        tokenizer = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        template = load_template(Path(folder))
        assert template is not None
        rows = list(measure(Texts(tokenizer, template, words, pool), rounds=5 if arguments.quick else 20))
    emit(rows, arguments.json)


def measure(texts: Texts, rounds: int) -> Iterator[Row]:
    for name, codec in {"tokenizers": plain_codec(texts.tokenizer), "fastokens": fast_codec(texts.tokenizer)}.items():
        if codec is not None:
            for what, seen in SEEN.items():
                yield cost(f"{TOKENS:,} tokens, {what}: {name}", texts, codec, seen, rounds)
            stalls = [asyncio.run(longest_stalls(texts, codec, Random(seed))) for seed in range(rounds)]
            busy, idle = (min(column) * 1e3 for column in zip(*stalls, strict=True))
            name = f"longest stall, {LONG_TOKENS:,} tokens: {name}"
            yield Row(name, busy, "ms", "an idle loop", idle, aim=STALL_MS, aim_is_for_value=True)


def cost(name: str, texts: Texts, codec: Codec, seen: int, rounds: int) -> Row:
    """Of a conversation whose first messages were `seen`."""
    encode, wholes, values = plain_codec(texts.tokenizer).encode, [], []
    for seed in range(rounds):
        chat = texts.conversation(Random(seed))
        tokenizer = texts.fresh(codec)
        asyncio.run(tokenizer.encode_chat(Chat(chat[:seen]), MOST_TOKENS))
        values.append(asyncio.run(cpu_s(tokenizer.encode_chat(Chat(chat), MOST_TOKENS))))
        started_s = time.process_time()
        encode([texts.template.render(Chat(chat))])
        wholes.append(time.process_time() - started_s)
    return Row(name, min(values) * 1e3, "ms of CPU", "tokenizers, whole", min(wholes) * 1e3)


async def cpu_s(work: Awaitable[object]) -> float:
    started_s = time.process_time()
    await work
    return time.process_time() - started_s


async def longest_stalls(texts: Texts, codec: Codec, rng: Random) -> tuple[float, float]:
    """While a request becomes one for a worker, and while as much time passes; in seconds."""
    content = " ".join(rng.choices(texts.words, k=LONG_TOKENS))
    body = msgspec.json.encode({"model": "bench", "messages": [{"role": "user", "content": content}]})
    tokenizer = texts.fresh(codec)
    started_s = time.perf_counter()
    working = asyncio.create_task(understand(body, tokenizer))
    busy_s = await longest_stall(working)
    assert len(working.result()) >= 4 * LONG_TOKENS
    return busy_s, await longest_stall(asyncio.create_task(asyncio.sleep(time.perf_counter() - started_s)))


async def longest_stall(working: asyncio.Task[object]) -> float:
    longest_s = 0.0
    while not working.done():
        due_s = time.perf_counter() + TIMER_S
        await asyncio.sleep(TIMER_S)
        longest_s = max(longest_s, time.perf_counter() - due_s)
    return longest_s


async def understand(body: bytes, tokenizer: Tokenizer) -> bytes:
    (prompt,) = await encode_prompts(parse_chat(body), tokenizer, MOST_TOKENS)
    return pack(prompt)


if __name__ == "__main__":
    main()
