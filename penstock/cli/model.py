"""Which model is meant: the bundled one, a folder, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

import penstock
from penstock.config import Model
from penstock.errors import MissingExtra, UnreadableModel

BUNDLED = Path(penstock.__file__).parent / "models" / "demo"
NEEDED = ("*.json", "*.safetensors", "*.jinja")  # not the same weights again in other formats
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_model(model: str, name: str = "") -> Model:
    """`model` as the user wrote it, empty for the bundled one; `name` overrides what clients will call it.

    Downloads what is not on this disk yet. Raises UnreadableModel or MissingExtra.
    """
    named = ("--model-name", name) if name else ()
    if not model:
        return Model(BUNDLED, name or "demo", named)
    folder = Path(model).resolve()
    if folder.exists():
        check_folder(folder)
        return Model(folder, name or folder.name, (str(folder), *named))
    if not HUB_ID.fullmatch(model):
        raise UnreadableModel(f"{model} is neither a folder nor a hub id such as org/name")
    return Model(download(model), name or model, (model, *named))


def check_folder(folder: Path) -> None:
    try:
        with (folder / "config.json").open("rb"):
            return
    except OSError as error:
        raise UnreadableModel(
            f"cannot read {folder / 'config.json'} ({error.strerror}): name the folder of a Hugging Face model"
        ) from error


def download(hub_id: str) -> Path:
    """The folder in the hub's cache that holds this model."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtra(f"fetching {hub_id} needs huggingface_hub: pip install 'penstock[torch]'") from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(NEEDED)))
    except (OSError, ValueError) as error:  # the hub's own errors are kinds of these
        first_line = str(error).strip().split("\n")[0]
        raise UnreadableModel(f"no folder {hub_id} here, and the hub does not give it: {first_line}") from error
