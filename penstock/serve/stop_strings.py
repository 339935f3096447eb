"""Stop strings in a text that comes in pieces. Used by `detokenizer`."""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Finds the first stop string in a growing text, and holds back what may become one."""

    __slots__ = ("_firsts", "_held", "_includes", "_longest", "_stops", "found")

    def __init__(self, stops: Sequence[str], includes: bool = False) -> None:
        """With `includes` the string that is found is part of the text."""
        self._stops = stops
        self._longest = max(len(stop) for stop in stops)
        self._firsts = {stop[0] for stop in stops}
        self._held = ""
        self._includes = includes
        self.found = ""

    def push(self, text: str) -> str:
        """The text that is certainly outside of any stop string; once one is found, the text before it, then none."""
        if self.found:
            return ""
        text = self._held + text
        hits = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            at, self.found = min(hits, key=lambda hit: hit[0])
            self._held = ""
            return text[: at + len(self.found) * self._includes]
        cut = self._first_suspect(text)
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """What was held back and did not become a stop string."""
        text, self._held = self._held, ""
        return text

    def _first_suspect(self, text: str) -> int:
        """Where the earliest ending of `text` starts that is the beginning of a stop string."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._firsts and any(stop.startswith(text[at:]) for stop in self._stops):
                return at
        return len(text)
