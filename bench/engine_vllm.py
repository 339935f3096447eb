"""vLLM's side of `engine.py`, for an interpreter that has it: measures what each line of standard input asks for.

    python -c "import engine_vllm; engine_vllm.run()" MODEL DTYPE

    "decode BATCH" | "prefill" | "mixed BATCH CHUNK"  ->  milliseconds

Times are what a caller of AsyncLLM sees: the engine is processes of its own, and tokens come from there.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from itertools import count, pairwise

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

PROMPT_TOKENS = 128
PREFILL_TOKENS = 512
STEPS = 16
VOCABULARY = 8192


async def main(model: str, dtype: str) -> None:
    settings = AsyncEngineArgs(
        model=model,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=1024,
        block_size=32,
        max_num_seqs=64,
        max_num_batched_tokens=64 * PROMPT_TOKENS,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    bench = Bench(AsyncLLM.from_engine_args(settings))
    print("ready", flush=True)
    for line in sys.stdin:
        case, *sizes = line.split()
        print(await getattr(bench, case)(*map(int, sizes)) * 1e3, flush=True)
    bench.engine.shutdown()


class Bench:
    """Answers in seconds."""

    def __init__(self, engine: AsyncLLM) -> None:
        self.engine = engine
        self._names = count()

    async def decode(self, batch: int) -> float:
        """Per step, between the first tokens of all sequences and their last ones."""
        times = await asyncio.gather(*(self._stamps(PROMPT_TOKENS, 1 + STEPS) for _ in range(batch)))
        return (max(own[-1] for own in times) - max(own[0] for own in times)) / STEPS

    async def prefill(self) -> float:
        begin = time.perf_counter()
        return (await self._stamps(PREFILL_TOKENS, 1))[0] - begin

    async def mixed(self, batch: int, chunk: int) -> float:
        """The longest step while `batch` sequences decode and a prompt of `chunk` tokens comes in."""
        started = asyncio.Event()
        decoding = [self._stamps(PROMPT_TOKENS, 1 + STEPS, started) for _ in range(batch)]
        times, _ = await asyncio.gather(asyncio.gather(*decoding), self._after(started, chunk))
        return max(later - earlier for earlier, later in pairwise(times[-1]))

    async def _after(self, started: asyncio.Event, chunk: int) -> None:
        await started.wait()
        await self._stamps(chunk, 1)

    async def _stamps(self, prompt_tokens: int, tokens: int, started: asyncio.Event | None = None) -> list[float]:
        """When each token came. `started` is set with the second."""
        prompt = {"prompt_token_ids": random.choices(range(VOCABULARY), k=prompt_tokens)}
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        stamps = []
        async for _ in self.engine.generate(prompt, sampling, str(next(self._names))):
            stamps.append(time.perf_counter())
            if started is not None and len(stamps) == 2:
                started.set()
        return stamps


def run() -> None:
    """For `python -c`: vLLM's processes import the main module again, where it is a file."""
    asyncio.run(main(*sys.argv[1:]))
