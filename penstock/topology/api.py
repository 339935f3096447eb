"""The port of topology: somebody who knows what is wired to what."""

from __future__ import annotations

from typing import Protocol

from penstock.fabric import Fabric


class Topology(Protocol):
    """A source of a fabric. Files are read when `load` is called, not before, and again each time."""

    def load(self) -> Fabric:
        """What is there now. Raises BadTopology for a source that cannot be read or contradicts itself."""
        ...
