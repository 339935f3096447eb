"""What the frontend process costs: CPU per streamed token and per request, with the simulated engine in others.

Real HTTP, one event per token. The frontend has a core for itself where there are two; the engines and the load
generator share another. CPU is user and system time of the frontend process, read from /proc. What KV-aware routing
costs is the difference between the policies of one case, which take turns; short prompts come again, and are cached.

With `--dynamo PYTHON`, an interpreter that has ai-dynamo 1.6.1, NVIDIA Dynamo's frontend takes turns too, with its own
simulated engine and with fastokens, as ours has where that is installed; `pairs` is beside its KV router.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random, randrange

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
CONFIG = {  # of weights that nobody loads
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY, "eos_token_id": 1},
    **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
}
FAST = ("--tokenizer=fastokens", "--no-tokenizer-fallback")
DYNAMO_ROUTERS = {"round_robin": "round-robin", "pairs": "kv"}
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


BOTH = ("round_robin", "pairs")
CASES = (
    Case("32 streams, a step every 6 ms", 0.006, 32, 128, 128, "CPU per token", "us", dict.fromkeys(BOTH, 25.0)),
    Case("256 streams, a step every 6 ms", 0.006, 256, 128, 128, "CPU per token", "us", dict.fromkeys(BOTH, 25.0)),
    Case("32 streams, as fast as it goes", 0.0, 32, 128, 128, "CPU per token", "us", dict.fromkeys(BOTH, 15.0)),
    Case(
        *("128 tokens in, 1 out", 0.0, 32, 128, 1, "CPU per request", "ms"),
        {"round_robin": 0.51, "p_token": 0.67, "pairs": 0.67},
        workers=2,
    ),
    Case(
        *("4,000 tokens in, 16 out", 0.0, 16, 4000, 16, "CPU per request", "ms", dict.fromkeys(BOTH, 0.93)),
        prompts=2_400,  # none comes again, as the frontend would remember its tokens
    ),
    Case("one client, 128 in, 2 out", 0.0, 1, 128, 2, "time to first token", "ms", {"pairs": 2.0}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="one short round; round robin only where it costs most")
    parser.add_argument(
        "--dynamo", metavar="PYTHON", help="an interpreter that has ai-dynamo: compare with its frontend"
    )
    arguments = parser.parse_args()
    rounds, seconds = (1, 2.0) if arguments.quick else (3, 4.0)
    cases = [quick(case) for case in CASES] if arguments.quick else CASES
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[1:] or cores)
    with tempfile.TemporaryDirectory() as folder:
        words = make_model(Path(folder))
        bench = Bench(Path(folder), words, rounds, seconds, cores[0], arguments.dynamo)
        emit((row for case in cases for row in bench.measure(case)), arguments.json)


def quick(case: Case) -> Case:
    """Routing is paid once for a request, so that its price shows where requests are short."""
    return case if case.tokens == 1 else replace(case, aims={"pairs": case.aims["pairs"]})


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
    settings = {"chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    marked = sorted(word for word in tokenizer.get_vocab() if word.startswith("Ġ") and word[1:].isalpha())
    return [word[1:] for word in marked if len(tokenizer.encode(" " + word[1:]).ids) == 1]


@dataclass(frozen=True, slots=True)
class Bench:
    """Measures cases. The frontends have `core` for themselves; `dynamo` is the Python of a peer, if there is one."""

    folder: Path
    words: Sequence[str]
    rounds: int
    seconds: float
    core: int
    dynamo: str | None

    def measure(self, case: Case) -> Iterator[Row]:
        """The least of several rounds, each with processes of its own: what else runs on this machine only adds."""
        samples: dict[str, list[float]] = {policy: [] for policy in case.aims}
        compared = [policy for policy in case.aims if policy in DYNAMO_ROUTERS] if self.dynamo else []
        theirs: dict[str, list[float]] = {policy: [] for policy in compared}
        for seed in range(self.rounds):
            for policy, values in samples.items():
                values.append(self._round(case, Random(seed), serving(self.folder, case, policy, self.core)))
            for policy, values in theirs.items():
                assert self.dynamo is not None
                frontend = serving_dynamo(self.dynamo, self.folder, case, policy, self.core)
                values.append(self._round(case, Random(seed), frontend))
        first, *_ = case.aims
        for policy, aim in case.aims.items():
            reference: tuple[str | None, float | None] = (None, None)
            if policy in theirs:
                reference = f"Dynamo, {DYNAMO_ROUTERS[policy]}", min(theirs[policy])
            elif policy != first:
                reference = first, min(samples[first])
            name = f"{case.what}: {case.name}" + (f", {policy}" if len(case.aims) > 1 else "")
            yield Row(name, min(samples[policy]), case.unit, *reference, aim, aim_is_for_value=True)

    def _round(self, case: Case, rng: Random, frontend: AbstractContextManager[tuple[tuple[str, int], int]]) -> float:
        prompts = [" " + " ".join(rng.choices(self.words, k=case.prompt_tokens)) for _ in range(case.prompts)]
        requests = [chat_request(MODEL, prompt, case.tokens) for prompt in prompts]
        cpu_s: list[float] = []
        with frontend as (address, process):
            totals = generate_load(
                address, requests, case.connections, 1.0, self.seconds, lambda: cpu_s.append(cpu_of(process))
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
def serving_dynamo(
    python: str, folder: Path, case: Case, policy: str, core: int
) -> Iterator[tuple[tuple[str, int], int]]:
    """The same of NVIDIA Dynamo: its frontend, and its simulated engine in another process, without etcd or NATS."""
    port = free_port()
    speed = 1 if case.step_s else 1_000_000  # its own pace is a step every 6 ms, or so
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as processes:
        settings = {"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": scratch, "DYN_REQUEST_PLANE": "tcp"}
        settings |= {"DYN_EVENT_PLANE": "zmq", "DYN_LOG": "warn", "HF_HUB_OFFLINE": "1"}
        router = DYNAMO_ROUTERS[policy]
        listen = ("--http-host=127.0.0.1", f"--http-port={port}", f"--router-mode={router}", *FAST)
        model = (f"--model-path={folder}", f"--model-name={MODEL}", "--block-size=16")
        engine = (*model, f"--speedup-ratio={speed}", f"--num-workers={case.workers}")
        for module, flags in (("dynamo.mocker", engine), ("dynamo.frontend", listen)):
            process = processes.enter_context(started([python, "-m", module, *flags], settings))
        os.sched_setaffinity(process, {core})
        wait_until(lambda: MODEL.encode() in page(port, "/v1/models"))
        time.sleep(2)  # the last workers register
        yield ("127.0.0.1", port), process


@contextmanager
def running(command: str, folder: Path | None, token: str, *flags: str) -> Iterator[int]:
    """A command of penstock, about the model in `folder` if it takes one; yields its process id."""
    model = [] if folder is None else [str(folder), f"--model-name={MODEL}"]
    arguments = [sys.executable, "-m", "penstock", command, *model, *flags, "--log-level=error"]
    with started(arguments, {"PENSTOCK_TOKEN": token}) as process:
        yield process


@contextmanager
def started(arguments: Sequence[str], settings: Mapping[str, str]) -> Iterator[int]:
    with subprocess.Popen(arguments, env=dict(os.environ) | settings) as process:
        try:
            yield process.pid
        finally:
            process.terminate()


def wait_ready(port: int, workers: int) -> None:
    wait_until(lambda: len(json.loads(page(port, "/health") or b'{"workers": []}')["workers"]) >= workers)


def wait_until(is_so: Callable[[], bool], timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > until:
            raise SystemExit(f"a server was not ready within {timeout_s:.0f} s")
        time.sleep(0.05)


def page(port: int, path: str) -> bytes:
    """Nothing where the server is not there, or not ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=1) as answer:
            return answer.read()
    except OSError:  # refused, reset, too slow, or a status that says not yet
        return b""


def free_port() -> int:
    """Below those that the kernel gives to connections: none of them takes it before a server does."""
    while True:
        try:
            with socket.create_server(("127.0.0.1", randrange(20_000, 32_000))) as listener:
                port: int = listener.getsockname()[1]
                return port
        except OSError:  # taken
            continue


def cpu_of(process: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


if __name__ == "__main__":
    main()
