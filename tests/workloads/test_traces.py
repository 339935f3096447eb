"""Traces: what is read, and what is said about files with mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.errors import SetupError
from penstock.workloads.traces import azure, mooncake
from penstock.workloads.workload import Session, Turn

ROW = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}


def write_mooncake(folder: Path, *rows: dict[str, object]) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_azure(folder: Path, *rows: str, header: str = "TIMESTAMP,ContextTokens,GeneratedTokens") -> Path:
    path = folder / "trace.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_mooncake(tmp_path: Path) -> None:
    later = ROW | {"timestamp": 2999, "input_length": 512, "hash_ids": [0], "output_length": 7, "other": "ignored"}
    assert list(mooncake(write_mooncake(tmp_path, ROW, later))) == [
        Session("trace:1", 0.0, (Turn(600, [0, 1], 5),)),
        Session("trace:2", 2.999, (Turn(512, [0], 7),)),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_length": "600"}, r"Expected `int`, got `str` - at `\$.input_length`"),
        ({"output_length": 0}, r"Expected `int` >= 1 - at `\$.output_length`"),
        ({"hash_ids": [0, "1"]}, r"Expected `int`, got `str` - at `\$.hash_ids\[1\]`"),
        ({"hash_ids": [0]}, "hash_ids has 1 ids, but input_length 600 makes 2 blocks of 512 tokens"),
        ({"timestamp": -1}, r"Expected `float` >= 0.0 - at `\$.timestamp`"),
        ({"timestamp": 5}, "timestamp 5 is before the line above; sort by it"),
    ],
)
def test_a_mistake_in_a_mooncake_trace_is_told_with_line_and_field(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = write_mooncake(tmp_path, ROW | {"timestamp": 10}, ROW | {"timestamp": 10} | change)
    sessions = iter(mooncake(path))
    next(sessions)
    with pytest.raises(SetupError, match=rf"trace.jsonl, line 2: {message}"):
        next(sessions)


def test_missing_fields_broken_lines_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="line 1: Object missing required field `output_length`"):
        list(mooncake(write_mooncake(tmp_path, {"timestamp": 0, "input_length": 1, "hash_ids": [1]})))
    (tmp_path / "broken.jsonl").write_text('{"timestamp": \n')
    with pytest.raises(SetupError, match=r"broken\.jsonl, line 1: "):
        list(mooncake(tmp_path / "broken.jsonl"))
    with pytest.raises(SetupError, match=r"there is no trace .*nowhere.csv"):
        list(azure(tmp_path / "nowhere.csv"))


def test_azure(tmp_path: Path) -> None:
    path = write_azure(tmp_path, "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.6805900,1025,109")
    first, second = azure(path)
    assert (first.id, first.start_s, second.start_s) == ("trace:2", 0.0, 4.0)
    assert [(s.turns[0].tokens, s.turns[0].output_tokens) for s in (first, second)] == [(374, 44), (1025, 109)]
    texts = [block for session in (first, second) for block in session.turns[0].blocks]
    assert len(texts) == len(set(texts)) == 1 + 3
    zoned = write_azure(tmp_path, "2024-05-10 00:00:00.009930+00:00,1,1", "2024-05-10 00:00:01+00:00,1,1")
    assert [session.start_s for session in azure(zoned)] == [0.0, pytest.approx(0.99007)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("yesterday,1,1", "TIMESTAMP 'yesterday' is no time like 2023"),
        ("2023-11-16 18:15:46,many,1", "ContextTokens 'many' is no positive number of tokens"),
        ("2023-11-16 18:15:46,1,0", "GeneratedTokens '0' is no positive number of tokens"),
        ("2023-11-16 18:15:46,1", "no GeneratedTokens; the first line must be"),
        ("2023-11-16 18:15:43,1,1", "TIMESTAMP 2023-11-16 18:15:43 is before the line above; sort by it"),
    ],
)
def test_a_mistake_in_an_azure_trace_is_told_with_line_and_field(tmp_path: Path, row: str, message: str) -> None:
    path = write_azure(tmp_path, "2023-11-16 18:15:44,1,1", row)
    with pytest.raises(SetupError, match=rf"trace.csv, line 3: {message}"):
        list(azure(path))


def test_an_azure_trace_without_its_header(tmp_path: Path) -> None:
    path = write_azure(tmp_path, "2023-11-16 18:15:44,1,1", header="time,in,out")
    with pytest.raises(SetupError, match="no TIMESTAMP; the first line must be TIMESTAMP,ContextTokens"):
        list(azure(path))
