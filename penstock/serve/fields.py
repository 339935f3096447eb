"""JSON objects of clients into values; what is wrong is a BadRequest that names the field. Pure."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from penstock.errors import BadRequest

T = TypeVar("T")

NAME_CHARS = 200  # of a field's name in an error: a client may have sent any
_UNKNOWN, _MISSING = "Object contains unknown field `", "Object missing required field `"


def convert(value: object, shape: type[T], where: str) -> T:
    """`value` as a `shape`; `where` is the path of the field that held it. Raises BadRequest."""
    try:
        return msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        raise _translate(str(error), where) from None


def _translate(problem: str, where: str) -> BadRequest:
    """From msgspec's message, such as "Expected `int`, got `str` - at `$.stop[0]`"."""
    what, found, at = problem.rpartition(" - at `$")
    if not found:
        what, at = problem, ""
    path = join(where, at.removesuffix("`").removeprefix("."))
    for start, meaning in ((_UNKNOWN, "there is no such field"), (_MISSING, "this field is required")):
        if what.startswith(start):
            path, what = join(path, what.removeprefix(start).removesuffix("`")), meaning
    path = path[:NAME_CHARS]
    return BadRequest(f"{path}: {what}", path or None)


def join(path: str, name: str) -> str:
    """The path of a field in the object at `path`."""
    return f"{path}.{name}" if path and name and not name.startswith("[") else path + name
