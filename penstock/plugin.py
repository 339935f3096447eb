"""Backends found by name: `penstock.engine.simulated` is the engine "simulated", since it defines ENGINE.

A module of a port's folder is a backend if it sets the port's name in capitals at its top level; beside it, its own
frozen `Options` where it has any. A new backend is a new file, and nothing else. A port inside a package is written
with a dot: "policy.routing", whose backends set ROUTING.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from penstock.config import suggestion
from penstock.errors import SetupError


def find(port: str, name: str) -> ModuleType:
    """The module of a backend. Raises SetupError where there is none of that name."""
    known = names(port)
    if name not in known:
        raise SetupError(f"there is no {_noun(port)} {name!r}{suggestion(name, known)}: there is {', '.join(known)}")
    return import_module(f"penstock.{port}.{name}")


def names(port: str) -> list[str]:
    """All backends of a port, without importing them: some need packages that are not installed."""
    spec = find_spec(f"penstock.{port}")
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(f"penstock has no port named {port!r}")
    sources = sorted(Path(spec.submodule_search_locations[0]).glob("*.py"))
    return [source.stem for source in sources if f"\n{_noun(port).upper()} = " in source.read_text(encoding="utf-8")]


def _noun(port: str) -> str:
    return port.rpartition(".")[2]
