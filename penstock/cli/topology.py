"""`penstock topology show`: what is wired to what, as a tree, as JSON, or as a drawing."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from penstock.cli.output import write
from penstock.config import suggestion
from penstock.errors import SetupError
from penstock.fabric import Fabric
from penstock.topology import file, labels
from penstock.topology.build import PRESETS, build
from penstock.topology.local import LocalTopology
from penstock.topology.outline import Group, across, outline, summary
from penstock.topology.svg import draw


def show(source: str, labels_file: Path | None, svg: Path | None, as_json: bool) -> None:
    """Prints a topology: see `find`. Raises SetupError."""
    fabric = find(source, labels_file)
    if svg is not None:
        write(svg, draw(fabric))
    if as_json:
        print(msgspec.json.encode({"vertices": list(fabric.vertices.values()), "links": fabric.links}).decode())
    else:
        Console(highlight=False, markup=False).print(*summary(fabric), tree(fabric), *across(fabric), sep="\n")


def find(source: str, labels_file: Path | None) -> Fabric:
    """The topology of a file or preset; or of nodes by their labels; or, without either, of this host."""
    if labels_file is not None:
        return labels.LabelsTopology(labels.Options(labels.read_labels(labels_file))).load()
    if not source:
        return LocalTopology().load()
    if Path(source).exists():
        return file.FileTopology(file.Options(Path(source))).load()
    if source in PRESETS:
        return build([PRESETS[source]])
    raise SetupError(
        f"{source} is neither a file nor a preset{suggestion(source, PRESETS)}: there is {', '.join(PRESETS)}"
    )


def tree(fabric: Fabric) -> Tree:
    """What is alike is shown once."""
    root = outline(fabric)
    shown = Tree(line(root), guide_style="dim")
    branches = [(shown, root)]
    while branches:
        branch, group = branches.pop()
        branches += [(branch.add(line(inner)), inner) for inner in group.inside]
    return shown


def line(group: Group) -> Text:
    return Text.assemble(
        (group.title, "bold"), *(("  " + fact, "dim" if number else "") for number, fact in enumerate(group.facts))
    )
