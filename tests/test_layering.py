"""Imports go one way; only `clock` and `cli` read clocks, chance and environment; torch stays in its corner.

These tests read the source, so a violation fails with its file and line whether or not a test runs that line.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

WORDS = (
    "auth",
    "blocks",
    "clock",
    "cluster",
    "columns",
    "config",
    "devices",
    "errors",
    "fabric",
    "grammar",
    "kv_events",
    "measures",
    "metrics",
    "page",
    "plot",
    "plugin",
    "request",
    "tokens",
)
PORTS = ("engine", "wire", "transport", "topology", "discovery", "launch")
PATH = ("policy", "kv", *PORTS, "serve")

# What each layer may import of penstock beside itself. "words" stands for WORDS; a dotted entry for a module.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "words": (),
    "policy": ("words",),
    "kv": ("words",),
    **{port: ("words", "policy", "kv") for port in PORTS},
    "serve": ("words", "policy", "kv", *(f"{port}.api" for port in PORTS)),
    "workloads": ("words",),
    "load": ("words", "workloads"),
    "sim": ("words", "workloads", *PATH),
    "cli": ("words", "workloads", *PATH, "load", "sim"),
    "__main__": ("cli",),
}

TORCH_IN = "penstock.engine.embedded"  # and every module whose name starts so
TORCH = ("torch", "transformers", "safetensors")

IMPURE_IN = ("penstock.clock", "penstock.cli")
IMPURE = (
    "time",
    "secrets",
    "uuid",
    "datetime.date.today",
    "datetime.datetime.now",
    "datetime.datetime.today",
    "datetime.datetime.utcnow",
    "os.environ",
    "os.environb",
    "os.getenv",
    "os.urandom",
)
CHANCE = ("random", "numpy.random")  # of these modules only the following, and only with a seed
SEEDED = ("random.Random", "numpy.random.Generator", "numpy.random.default_rng")

VIRTUAL = ("policy", "kv", "serve", "wire.memory", "transport.memory", "discovery.memory")
THREADS = (
    "threading",
    "concurrent.futures",
    "multiprocessing",
    "asyncio.to_thread",
    "asyncio.run_coroutine_threadsafe",
)

Finding = tuple[int, str]  # line, what is wrong and what is allowed


def is_inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def layer_of(name: str) -> str:
    """The layer of a module of penstock, or of a name in one. A new top-level module must be listed above."""
    top = name.split(".")[1] if "." in name else ""
    layer = "words" if top in ("", "__version__", *WORDS) else top
    assert layer in MAY_IMPORT, f"{name} belongs to no layer: list it in {Path(__file__).name}"
    return layer


def imports(tree: ast.AST) -> Iterator[Finding]:
    """(line, dotted name) of every import, at any depth; `from a import b` is `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def bindings(tree: ast.AST) -> dict[str, str]:
    """What imported names stand for: `import numpy as np` binds np to numpy."""
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                bound |= {alias.asname: alias.name} if alias.asname else {top: top}
        elif isinstance(node, ast.ImportFrom):
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return bound


def dotted(node: ast.AST, bound: dict[str, str]) -> str | None:
    """`np.random.rand` as numpy.random.rand; None for what does not start at an imported name."""
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    if isinstance(node, ast.Attribute):
        origin = dotted(node.value, bound)
        return origin and f"{origin}.{node.attr}"
    return None


def attributes(tree: ast.AST, bound: dict[str, str]) -> Iterator[Finding]:
    """(line, dotted name) of every attribute read from something imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node, bound)):
            yield node.lineno, name


def wrong_direction(module: str, tree: ast.AST) -> Iterator[Finding]:
    layer = layer_of(module)
    allowed = (layer, *MAY_IMPORT[layer])
    modules = tuple(f"penstock.{entry}" for entry in allowed if "." in entry)
    for line, name in imports(tree):
        if name.startswith("."):
            yield line, f"relative import of {name}; write the whole name"
        elif is_inside(name, ("penstock",)) and layer_of(name) not in allowed and not is_inside(name, modules):
            yield line, f"{layer} imports {name}; it may import {', '.join(allowed)}"


def torch_elsewhere(module: str, tree: ast.AST) -> Iterator[Finding]:
    for line, name in imports(tree):
        if is_inside(name, TORCH) and not module.startswith(TORCH_IN):
            yield line, f"imports {name}; only {TORCH_IN}* may"


def impure(module: str, tree: ast.AST) -> Iterator[Finding]:
    """Clocks, unseeded randomness and the environment, imported or used."""
    if is_inside(module, IMPURE_IN):
        return
    bound = bindings(tree)
    instead = "only clock and cli may; take `now`, a seeded Random or a setting as an argument"
    for line, name in (*imports(tree), *attributes(tree, bound)):
        if is_inside(name, IMPURE) or is_chance(name):
            yield line, f"uses {name}; {instead}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not node.args and dotted(node.func, bound) in SEEDED:
            yield node.lineno, f"calls {dotted(node.func, bound)} without a seed; {instead}"


def is_chance(name: str) -> bool:
    return is_inside(name, CHANCE) and name not in CHANCE and not is_inside(name, SEEDED)


def threads(module: str, tree: ast.AST) -> Iterator[Finding]:
    """Threads where the virtual loop must be able to run."""
    if not is_inside(module, tuple(f"penstock.{entry}" for entry in VIRTUAL)):
        return
    for line, name in (*imports(tree), *attributes(tree, bindings(tree))):
        if is_inside(name, THREADS):
            yield line, f"uses {name}; this module also runs on the virtual loop, which has no threads"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "run_in_executor":
            yield node.lineno, "uses run_in_executor; the virtual loop has no threads"


RULES = (wrong_direction, torch_elsewhere, impure, threads)


def findings(module: str, source: str) -> list[Finding]:
    tree = ast.parse(source)
    return sorted({finding for rule in RULES for finding in rule(module, tree)})


def modules() -> dict[str, Path]:
    """Every module of penstock by its dotted name."""
    found = {}
    for path in sorted((ROOT / "penstock").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def test_the_source_keeps_to_its_layers() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for module, path in modules().items()
        for line, what in findings(module, path.read_text())
    ]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("penstock.request", "from penstock.kv.pool import BlockPool"),
        ("penstock.policy.batching", "import penstock.kv.pool"),
        ("penstock.kv.pool", "def f():\n    from penstock.policy import batching"),
        ("penstock.wire.stream", "from penstock.transport.api import Transport"),
        ("penstock.serve.decode", "from penstock.engine.embedded import Engine"),
        ("penstock.serve.decode", "from penstock.engine import embedded"),
        ("penstock.serve.decode", "from .rpc import call"),
        ("penstock.engine.simulated", "from penstock.sim.loop import VirtualLoop"),
        ("penstock.sim.world", "from penstock.cli import main"),
        ("penstock.engine.simulated", "import torch.nn.functional as F"),
        ("penstock.cli.serve", "from transformers import AutoConfig"),
        ("penstock.serve.router", "import time"),
        ("penstock.serve.router", "from time import monotonic as now"),
        ("penstock.serve.router", "from datetime import datetime\ndatetime.now()"),
        ("penstock.serve.router", "import os as system\nsystem.environ['HOME']"),
        ("penstock.serve.router", "from os import getenv"),
        ("penstock.serve.router", "import random\nrandom.shuffle([1])"),
        ("penstock.serve.router", "from random import SystemRandom"),
        ("penstock.serve.router", "from random import Random\nRandom()"),
        ("penstock.sim.workload", "import numpy as np\nnp.random.rand(3)"),
        ("penstock.sim.workload", "import numpy as np\nnp.random.default_rng()"),
        ("penstock.kv.lease", "import uuid"),
        ("penstock.serve.rpc", "import asyncio\nasyncio.to_thread(print)"),
        ("penstock.wire.memory", "import asyncio\nasyncio.get_running_loop().run_in_executor(None, print)"),
    ],
)
def test_a_violation_is_found(module: str, source: str) -> None:
    last_line = source.count("\n") + 1
    assert [line for line, _ in findings(module, source)] == [last_line]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("penstock.serve.decode", "from penstock.engine.api import Engine\nfrom penstock.kv import lease"),
        ("penstock.serve.decode", "from penstock import clock, errors\nclock.now()"),
        ("penstock.engine.embedded_attention", "import torch"),
        ("penstock.discovery.file", "from penstock.cluster import Member\nfrom penstock import __version__"),
        ("penstock.clock", "import time"),
        ("penstock.cli.serve", "import os\nos.environ.get('HOME')"),
        ("penstock.sim.workload", "from random import Random\nRandom(7).random()"),
        ("penstock.sim.workload", "import numpy as np\nnp.random.default_rng(7).random(3)"),
        ("penstock.__main__", "from penstock.cli import main"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert findings(module, source) == []


def test_a_module_of_no_layer_is_refused() -> None:
    with pytest.raises(AssertionError, match="belongs to no layer"):
        findings("penstock.helpers", "import penstock")


def test_importing_penstock_leaves_torch_out() -> None:
    names = [name for name in modules() if not name.startswith(TORCH_IN) and name != "penstock.__main__"]
    script = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    loaded = [heavy for heavy in {TORCH!r} if heavy in sys.modules]
    assert not loaded, f"importing {{name}} imports {{', '.join(loaded)}}"
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
