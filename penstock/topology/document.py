"""YAML read with an eye on where each value stands: a mistake is told with its file, line and field."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import yaml

from penstock.config import suggestion
from penstock.errors import BadTopology
from penstock.topology import units

DEEPEST = 60  # fields inside fields; also ends a file whose aliases lead back into themselves

VERTEX_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Field:
    """One value of a file. Every method that reads it raises BadTopology for what it is not."""

    file: str
    path: tuple[str, ...]  # names of fields, and of items of lists as [0]
    node: yaml.Node

    def wrong(self, what: str) -> BadTopology:
        """The error that says where this field is, and what is wrong with it."""
        name = ".".join(self.path).replace(".[", "[")
        return BadTopology(f"{self.file}:{self.node.start_mark.line + 1}: {name + ': ' if name else ''}{what}")

    def fields(self, known: Collection[str]) -> dict[str, Field]:
        """The fields of a mapping, all of them `known`."""
        found = self.entries()
        for name, (key, _) in found.items():
            if name not in known:
                raise key.wrong(f"no such field{suggestion(name, known)}: there is {', '.join(known)}")
        return {name: value for name, (_, value) in found.items()}

    def entries(self) -> dict[str, tuple[Field, Field]]:
        """The fields of a mapping, whatever their names: the name and the value, each as a field."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.wrong(f"needs fields and their values, not {_describe(self.node)}")
        found: dict[str, tuple[Field, Field]] = {}
        for key, value in self.node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.wrong(f"the name of a field is a text, not {_describe(key)}")
            name = str(key.value)
            if name in found:
                raise self._inner(name, key).wrong("is there a second time")
            found[name] = (self._inner(name, key), self._inner(name, value))
        return found

    def items(self) -> list[Field]:
        """The items of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.wrong(f"needs a list, not {_describe(self.node)}")
        return [self._inner(f"[{number}]", item) for number, item in enumerate(self.node.value)]

    def text(self) -> str:
        if not isinstance(self.node, yaml.ScalarNode) or self.node.tag != "tag:yaml.org,2002:str":
            raise self.wrong(f"needs a text, not {_describe(self.node)}")
        return str(self.node.value)

    def is_text(self, text: str) -> bool:
        return isinstance(self.node, yaml.ScalarNode) and self.node.value == text

    def name(self) -> str:
        """Of a vertex, which may look like a number."""
        if not isinstance(self.node, yaml.ScalarNode) or not VERTEX_NAME.fullmatch(self.node.value):
            raise self.wrong(f"needs a name of letters, digits, '.', '_' and '-', not {_describe(self.node)}")
        return str(self.node.value)

    def choice(self, known: Collection[str]) -> str:
        text = self.text()
        if text not in known:
            raise self.wrong(f"{text!r} is not known{suggestion(text, known)}: there is {', '.join(known)}")
        return text

    def has(self, name: str) -> bool:
        """Whether it has fields, one of that name among them."""
        return isinstance(self.node, yaml.MappingNode) and any(key.value == name for key, _ in self.node.value)

    def is_single(self) -> bool:
        """A text, a number or the like: neither fields nor a list."""
        return isinstance(self.node, yaml.ScalarNode)

    def flag(self) -> bool:
        if self.node.tag != "tag:yaml.org,2002:bool":
            raise self.wrong(f"needs true or false, not {_describe(self.node)}")
        return str(self.node.value).lower() in ("true", "yes", "on")

    def whole(self, least: int, most: int) -> int:
        if self.node.tag != "tag:yaml.org,2002:int" or not str(self.node.value).isdecimal():
            raise self.wrong(f"needs a whole number, not {_describe(self.node)}")
        number = int(self.node.value)
        if not least <= number <= most:
            raise self.wrong(f"{number} is not between {least} and {most}")
        return number

    def amount(self) -> float:
        """A number of at least 0, which may be written as 2.5e-8."""
        text = str(self.node.value)
        if not self.is_single() or not re.fullmatch(r"[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?", text):
            raise self.wrong(f"needs a number of at least 0, such as 2.5e-8, not {_describe(self.node)}")
        return float(text)

    def ratio(self) -> float:
        """A number above 0, written as such or as in 4:1."""
        text = str(self.node.value)
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(?::1)?", text)
        if not isinstance(self.node, yaml.ScalarNode) or match is None or float(match[1]) <= 0:
            raise self.wrong(f"needs a number above 0, such as 2 or 2:1, not {_describe(self.node)}")
        return float(match[1])

    def quantity(self, kind: units.Kind) -> float:
        if not isinstance(self.node, yaml.ScalarNode):
            raise self.wrong(f"needs a {kind} such as {units.EXAMPLES[kind]}, not {_describe(self.node)}")
        try:
            return units.parse(self.node.value, kind)
        except ValueError as error:
            raise self.wrong(str(error)) from None

    def positive(self, kind: units.Kind) -> float:
        amount = self.quantity(kind)
        if amount <= 0:
            raise self.wrong("must be above 0")
        return amount

    def _inner(self, name: str, node: yaml.Node) -> Field:
        field = Field(self.file, (*self.path, name), node)
        if len(field.path) > DEEPEST:
            raise BadTopology(f"{self.file}:{node.start_mark.line + 1}: too many fields inside fields")
        return field


def read(path: Path, remedy: str) -> Field:
    """The whole of a file. `remedy` says what to write into an empty one."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadTopology(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadTopology(f"{path}: not a text file: {error.reason} at byte {error.start}") from None
    return parse(text, str(path), remedy)


def parse(text: str, file: str, remedy: str) -> Field:
    """The same of a text, which messages call `file`."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise BadTopology(f"{file}:{_line(error)}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise BadTopology(f"{file}: not YAML: {error}") from None
    except RecursionError:
        raise BadTopology(f"{file}: too many fields inside fields") from None
    if node is None:
        raise BadTopology(f"{file}:1: the file is empty; {remedy}")
    return Field(file, (), node)


def _line(error: yaml.MarkedYAMLError) -> int:
    mark = error.problem_mark or error.context_mark
    return mark.line + 1 if mark is not None else 1


def _describe(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "fields"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return repr(node.value) if node.value else "nothing"
