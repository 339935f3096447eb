"""Where a JSON value ends in a text that comes in pieces."""

from __future__ import annotations

import re

_CLOSING = {"{": "}", "[": "]"}
_IN_STRING = re.compile(r'[^"\\]*')
_BETWEEN = re.compile(r"[ \t\r\nA-Za-z0-9,:.+-]*")  # what may stand between strings and brackets
_SCALAR = re.compile(r"[A-Za-z0-9.+-]*")


class JsonText:
    """Follows one value from its first character, which is no whitespace, to its last.

    It checks what it takes to find the end, brackets and strings, and leaves the rest to who reads the value: a model
    that writes `tru` has still written an argument. Once `is_over`, the value ended, or, unless `is_whole`, broke off.
    """

    __slots__ = ("_in_string", "_is_escaped", "_open", "_shape", "is_over", "is_whole")

    def __init__(self) -> None:
        self.is_over = False
        self.is_whole = False
        self._shape = ""  # the value's first character
        self._open: list[str] = []  # the brackets to come, the next one last
        self._in_string = False
        self._is_escaped = False

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the value; all of them, until it is over."""
        if not self._shape:
            self._shape = text[:1]
        at = 0
        while at < len(text) and not self.is_over:
            at = self._string(text, at) if self._in_string else self._structure(text, at)
        return at

    def _string(self, text: str, at: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return at + 1
        at = _end(_IN_STRING, text, at)
        if text.startswith('"', at):
            self._in_string = False
            self._end_if(not self._open)
        self._is_escaped = text.startswith("\\", at)
        return min(at + 1, len(text))

    def _structure(self, text: str, at: int) -> int:
        if self._shape not in '"{[':
            return self._scalar(text, at)
        at = _end(_BETWEEN, text, at)
        if at == len(text):
            return at
        char = text[at]
        if char == '"':
            self._in_string = True
        elif char in _CLOSING:
            self._open.append(_CLOSING[char])
        elif self._open and char == self._open[-1]:
            self._open.pop()
            self._end_if(not self._open)
        else:
            self.is_over = True
            return at
        return at + 1

    def _scalar(self, text: str, at: int) -> int:
        end = _end(_SCALAR, text, at)
        self.is_over = end < len(text)
        self.is_whole = self.is_over and _SCALAR.fullmatch(self._shape) is not None
        return end

    def _end_if(self, is_last: bool) -> None:
        self.is_over = self.is_whole = is_last


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    assert found is not None  # these patterns match nothing, too
    return found.end()
