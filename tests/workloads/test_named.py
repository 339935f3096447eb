"""Workloads by name: what is found, and what is said of names and settings that do not fit."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from penstock.errors import SetupError
from penstock.workloads.mooncake_like import mooncake_like
from penstock.workloads.named import KINDS, find


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_ends_and_is_the_same_each_time(kind: str) -> None:
    sessions = list(find(f"{kind}:requests=20,seed=3"))
    assert sum(len(session.turns) for session in sessions) == 20
    assert sessions == list(find(f"{kind}:seed=3,requests=20")) != list(find(f"{kind}:requests=20,seed=4"))
    assert all(earlier.start_s <= later.start_s for earlier, later in pairwise(sessions))


def test_settings_reach_the_workload() -> None:
    sessions = list(find("poisson:rate=50,input=700,output=9,input_cv=0,output_cv=0,shared=1024,requests=2000"))
    assert {(turn.tokens, turn.output_tokens) for session in sessions for turn in session.turns} == {(1_724, 9)}
    assert 2_000 / sessions[-1].start_s == pytest.approx(50, rel=0.1)
    assert list(find("mooncake-like:requests=5")) == list(mooncake_like(0, 5))


def test_traces_by_their_path(tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 5, "output_length": 7, "hash_ids": [3]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "b.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00,5,7\n")
    for name in ("a.jsonl", "b.csv"):
        assert [turn.output_tokens for session in find(str(tmp_path / name)) for turn in session.turns] == [7]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("chta:rate=4", r"no workload 'chta:rate=4' \(did you mean 'chat'\?\): there is mooncake-like, chat"),
        ("trace.parquet", r"files that end in \.jsonl or \.csv"),
        ("chat:rat=4", r"workload 'chat' has no option 'rat' \(did you mean 'rate'\?\)"),
        ("chat:rate=fast", r"workload 'chat' does not fit: .*\$\.rate"),
        ("chat:rate=0", r"workload 'chat' does not fit: .*> 0\.0 - at `\$\.rate`"),
        ("chat:requests=0", r">= 1 - at `\$\.requests`"),
        ("diurnal:swing=2", r"<= 1\.0 - at `\$\.swing`"),
        ("chat:rate", "'rate' is no setting; write them as chat:key=value,key=value"),
        ("chat:rate=4,", "'' is no setting"),
        ("chat:seed=1,seed=2", "'seed' is set twice"),
    ],
)
def test_a_mistake_names_the_setting(spec: str, message: str) -> None:
    with pytest.raises(SetupError, match=message):
        find(spec)
