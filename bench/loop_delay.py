"""How late a worker's event loop runs timers while its engine computes: 32 streams against none, the bundled model.

The figure is what the worker itself reports (serve/pulse.py): the 99th percentile of the last 20 s.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loadgen import chat_request, generate_load
from report import Row, emit

import penstock

STREAMS = 32
WINDOW_S = 20.0  # as long as the worker's own
QUESTIONS = Path(penstock.__file__).parent / "models" / "demo" / "questions.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="accepted for uniformity; it takes 50 s either way")
    arguments = parser.parse_args()
    requests = [chat_request("demo", question, 128) for question in QUESTIONS.read_text().splitlines()]
    with serving() as ready:
        host, port = ready["url"].removeprefix("http://").split(":")
        time.sleep(WINDOW_S)
        idle = delays_s(ready["url"])
        generate_load((host, int(port)), requests, STREAMS, 1.0, WINDOW_S, lambda: None)
        busy = delays_s(ready["url"])
    rows = [
        Row(f"event loop delay p99, {name}, {STREAMS} streams", busy[name] * 1e3, "ms", "idle", idle[name] * 1e3)
        for name in busy
    ]
    emit(rows, arguments.json)


@contextmanager
def serving() -> Iterator[dict[str, Any]]:
    """One prefill and one decode worker; yields the server's ready event."""
    command = [sys.executable, "-m", "penstock", "serve", "--port=0", "--json", "--no-ask"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield next(event for event in map(json.loads, process.stdout) if event["event"] == "ready")
        finally:
            process.terminate()


def delays_s(url: str) -> dict[str, float]:
    """By process."""
    with urllib.request.urlopen(f"{url}/metrics") as page:
        lines = page.read().decode().splitlines()
    found = [line for line in lines if line.startswith("penstock_event_loop_delay_seconds{")]
    return {line.split('process="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in found}


if __name__ == "__main__":
    main()
