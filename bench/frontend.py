"""What the frontend process costs: CPU per streamed token and per request, with the simulated engine in others.

Real HTTP, one event per token. The frontend has a core for itself where there are two; the engines and the load
generator share another. CPU is user and system time of the frontend process, read from /proc. What KV-aware routing
costs is the difference between the policies of one case, which take turns; short prompts come again, and are cached.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from loadgen import Totals, chat_request, generate_load
from report import Row, emit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

MODEL = "bench"
SPECIAL = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 16_000
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Case:
    """A load, and what is asked about it of each policy. The others are compared with the first."""

    name: str
    step_s: float  # of the simulated engine
    connections: int
    prompt_tokens: int
    tokens: int
    what: str  # is measured: "CPU per token", "CPU per request" or "time to first token"
    unit: str
    aims: Mapping[str, float]  # by policy
    workers: int = 1
    prompts: int = 400  # after so many, they come again


CASES = (
    Case("256 streams, a step every 6 ms", 0.006, 256, 128, 128, "CPU per token", "us", {"pairs": 25.0}),
    Case("32 streams, as fast as it goes", 0.0, 32, 128, 128, "CPU per token", "us", {"pairs": 15.0}),
    Case(
        *("128 tokens in, 1 out", 0.0, 32, 128, 1, "CPU per request", "ms"),
        {"round_robin": 0.51, "p_token": 0.67, "pairs": 0.67},
        workers=2,
    ),
    Case(
        *("4,000 tokens in, 16 out", 0.0, 16, 4000, 16, "CPU per request", "ms", {"pairs": 0.93}),
        prompts=2_400,  # none comes again, as the frontend would remember its tokens
    ),
    Case("one client, 128 in, 2 out", 0.0, 1, 128, 2, "time to first token", "ms", {"pairs": 2.0}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="one short round")
    arguments = parser.parse_args()
    rounds, seconds = (1, 2.5) if arguments.quick else (5, 5.0)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[1:] or cores)
    with tempfile.TemporaryDirectory() as folder:
        words = make_model(Path(folder))
        rows = [row for case in CASES for row in measure(Path(folder), words, case, rounds, seconds, cores[0])]
    emit(rows, arguments.json)


def make_model(folder: Path) -> list[str]:
    """A folder without weights: a byte-level tokenizer trained on Python's sources. Returns words of one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    marked = sorted(word for word in tokenizer.get_vocab() if word.startswith("Ġ") and word[1:].isalpha())
    return [word[1:] for word in marked if len(tokenizer.encode(" " + word[1:]).ids) == 1]


def measure(folder: Path, words: Sequence[str], case: Case, rounds: int, seconds: float, core: int) -> Iterator[Row]:
    """The least of several rounds, each with processes of its own: what else runs on this machine only adds."""
    samples: dict[str, list[float]] = {policy: [] for policy in case.aims}
    for seed in range(rounds):
        for policy, values in samples.items():
            values.append(one_round(folder, words, case, policy, Random(seed), seconds, core))
    first, *_ = case.aims
    for policy, aim in case.aims.items():
        reference = (None, None) if policy == first else (first, min(samples[first]))
        name = f"{case.what}: {case.name}" + (f", {policy}" if len(case.aims) > 1 else "")
        yield Row(name, min(samples[policy]), case.unit, *reference, aim, aim_is_for_value=True)


def one_round(
    folder: Path, words: Sequence[str], case: Case, policy: str, rng: Random, seconds: float, core: int
) -> float:
    prompts = [" " + " ".join(rng.choices(words, k=case.prompt_tokens)) for _ in range(case.prompts)]
    requests = [chat_request(MODEL, prompt, case.tokens) for prompt in prompts]
    cpu_s: list[float] = []
    with serving(folder, case, policy, core) as (address, frontend):
        totals = generate_load(
            address, requests, case.connections, 1.0, seconds, lambda: cpu_s.append(cpu_of(frontend))
        )
    if totals.errors:
        raise SystemExit(f"{case.name}: {totals.errors[0]}")
    return result(totals, cpu_s[1] - cpu_s[0], case)


def result(totals: Totals, cpu_s: float, case: Case) -> float:
    match case.what:
        case "CPU per token":
            return cpu_s / totals.tokens(case.tokens) * 1e6
        case "CPU per request":
            return cpu_s / totals.requests * 1e3
    return totals.median_first_event_s * 1e3


@contextmanager
def serving(folder: Path, case: Case, policy: str, core: int) -> Iterator[tuple[tuple[str, int], int]]:
    """Starts a frontend on `core` and workers; yields the frontend's address and process id."""
    port, join_port = free_port(), free_port()
    options = {"vocab_size": VOCABULARY, "first_token": len(SPECIAL), "step_s": case.step_s}
    options |= {"prefill_token_s": 0, "decode_sequence_s": 0}
    flags = [f"--engine-option.{name}={value}" for name, value in options.items()]
    token = secrets.token_hex(8)
    frontend = ("frontend", folder, token, f"--port={port}", f"--join-port={join_port}", f"--policy={policy}")
    with running(*frontend) as process, ExitStack() as workers:
        for _ in range(case.workers):
            join = f"--join=127.0.0.1:{join_port}"
            workers.enter_context(running("worker", folder, token, join, "--engine=simulated", *flags))
        os.sched_setaffinity(process, {core})
        wait_ready(port, case.workers)
        yield ("127.0.0.1", port), process


@contextmanager
def running(command: str, folder: Path | None, token: str, *flags: str) -> Iterator[int]:
    """A command of penstock, about the model in `folder` if it takes one; yields its process id."""
    model = [] if folder is None else [str(folder), f"--model-name={MODEL}"]
    arguments = [sys.executable, "-m", "penstock", command, *model, *flags]
    with subprocess.Popen(
        [*arguments, "--log-level=error"], env=dict(os.environ) | {"PENSTOCK_TOKEN": token}
    ) as process:
        try:
            yield process.pid
        finally:
            process.terminate()


def wait_ready(port: int, workers: int, timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while joined(port) < workers:
        if time.monotonic() > until:
            raise SystemExit(f"{workers} workers did not join within {timeout_s:.0f} s")
        time.sleep(0.05)


def joined(port: int) -> int:
    """Workers that the frontend knows; none while it is not there, or not ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as page:
            return len(json.load(page)["workers"])
    except OSError:  # refused, reset, too slow, or a status that says not yet
        return 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def cpu_of(process: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


if __name__ == "__main__":
    main()
