"""Workloads from files, in the two formats of the field. They are read line by line as they are played.

A mistake in a file raises SetupError that names file, line and field, when that line is reached.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from penstock.errors import SetupError
from penstock.workloads.workload import BLOCK_TOKENS, BlockSupply, Session, Turn, Workload, blocks_for


def mooncake(path: Path) -> Workload:
    """Mooncake's JSONL: `timestamp` in ms, `input_length`, `output_length`, and `hash_ids` of blocks of 512 tokens.

    Prompts that begin with equal ids begin with equal text. Each line is a session of one turn.
    """
    return Workload(lambda: _read_mooncake(_existing(path)))


def azure(path: Path) -> Workload:
    """Azure's CSV: TIMESTAMP, ContextTokens, GeneratedTokens. Nothing is known of the text, so no two share any."""
    return Workload(lambda: _read_azure(_existing(path)))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise SetupError(f"there is no trace {path}")
    return path


class _MooncakeRow(msgspec.Struct):
    timestamp: Annotated[float, Meta(ge=0)]
    input_length: Annotated[int, Meta(ge=1)]
    output_length: Annotated[int, Meta(ge=1)]
    hash_ids: list[Annotated[int, Meta(ge=0, le=2**63 - 1)]]


def _read_mooncake(path: Path) -> Iterator[Session]:
    decode = msgspec.json.Decoder(_MooncakeRow).decode
    before_ms = 0.0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = decode(line)
            except msgspec.DecodeError as error:
                raise SetupError(f"{path}, line {number}: {error}") from None
            if len(row.hash_ids) != blocks_for(row.input_length):
                raise SetupError(
                    f"{path}, line {number}: hash_ids has {len(row.hash_ids)} ids, but input_length {row.input_length} "
                    f"makes {blocks_for(row.input_length)} blocks of {BLOCK_TOKENS} tokens"
                )
            if row.timestamp < before_ms:
                raise SetupError(
                    f"{path}, line {number}: timestamp {row.timestamp:g} is before the line above; sort by it"
                )
            before_ms = row.timestamp
            turn = Turn(row.input_length, row.hash_ids, row.output_length)
            yield Session(f"{path.stem}:{number}", row.timestamp / 1e3, (turn,))


def _read_azure(path: Path) -> Iterator[Session]:
    supply = BlockSupply(f"azure {path.name}")
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        begun: datetime | None = None
        before_s = 0.0
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            at = _time(where, row)
            begun = begun or at
            start_s = (at - begun).total_seconds()
            if start_s < before_s:
                raise SetupError(f"{where}: TIMESTAMP {at} is before the line above; sort by it")
            before_s = start_s
            tokens = _tokens(where, row, "ContextTokens")
            turn = Turn(tokens, supply.take(tokens), _tokens(where, row, "GeneratedTokens"))
            yield Session(f"{path.stem}:{rows.line_num}", start_s, (turn,))


def _time(where: str, row: dict[str, str]) -> datetime:
    text = _field(where, row, "TIMESTAMP")
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise SetupError(f"{where}: TIMESTAMP {text!r} is no time like 2023-11-16 18:15:46.680590") from None


def _tokens(where: str, row: dict[str, str], field: str) -> int:
    text = _field(where, row, field)
    if not text.isdecimal() or int(text) == 0:
        raise SetupError(f"{where}: {field} {text!r} is no positive number of tokens")
    return int(text)


def _field(where: str, row: dict[str, str], field: str) -> str:
    text = row.get(field)
    if text is None:
        raise SetupError(f"{where}: no {field}; the first line must be TIMESTAMP,ContextTokens,GeneratedTokens")
    return text
