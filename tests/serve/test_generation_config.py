"""What a model's folder advises where a client says nothing."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from penstock.cluster import ModelCard
from penstock.errors import UnreadableModel
from penstock.request import Sampling
from penstock.serve.frontend import Frontend
from penstock.serve.generation_config import FEATURE_OF, NO_DEFAULTS, Defaults, load_defaults
from tests.serve.fake_backend import Client, FakeBackend
from tests.serve.test_frontend import play

FEATURES = ("sampling", "penalties")


def write(folder: Path, **fields: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


def test_the_fields_of_a_published_file(tmp_path: Path) -> None:
    fields = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05, "max_new_tokens": 2048}
    rest = {"do_sample": True, "eos_token_id": [1, 2], "transformers_version": "5.23.0", "min_p": None}
    defaults = load_defaults(write(tmp_path, **fields, **rest))
    assert defaults == Defaults(**fields)
    assert defaults.sampling(FEATURES) == {name: fields[name] for name in FEATURE_OF if name in fields}


def test_every_default_is_a_field_of_sampling() -> None:
    assert set(FEATURE_OF) <= {field.name for field in msgspec.structs.fields(Sampling)}


def test_no_file_and_an_empty_one_advise_nothing(tmp_path: Path) -> None:
    assert load_defaults(tmp_path) == NO_DEFAULTS == load_defaults(write(tmp_path))
    assert NO_DEFAULTS.sampling(FEATURES) == {}


def test_what_an_engine_cannot_do_is_no_default_for_it() -> None:
    defaults = Defaults(temperature=0.5, repetition_penalty=1.1)
    assert defaults.sampling(("sampling",)) == {"temperature": 0.5}
    assert defaults.sampling(()) == {}


def test_all_tokens_are_kept_by_either_number() -> None:
    assert Defaults(top_k=-1).sampling(FEATURES) == {}


@pytest.mark.parametrize("fields", [{"temperature": -1}, {"top_p": "0.9"}, {"top_k": 0.5}, {"max_new_tokens": 0}])
def test_a_broken_file_stops_the_start(tmp_path: Path, fields: dict[str, object]) -> None:
    (name,) = fields
    with pytest.raises(UnreadableModel, match=rf"generation_config\.json.*{name}.*--no-generation-config"):
        load_defaults(write(tmp_path, **fields))


def test_no_json_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(UnreadableModel, match=r"generation_config\.json"):
        load_defaults(tmp_path)


# What clients get


def test_a_client_that_says_nothing_gets_the_models_defaults() -> None:
    advised = Defaults(temperature=0.6, top_k=20, repetition_penalty=1.05, max_new_tokens=7)

    async def story(app: Frontend, backend: FakeBackend) -> None:
        messages = [{"role": "user", "content": "water"}]
        for more in ({}, {"temperature": 0, "top_p": 0.5, "max_tokens": 9}, {"repetition_penalty": None}):
            client = await Client(app).ask(
                "POST", "/v1/chat/completions", {"model": "demo", "messages": messages, **more}
            )
            assert client.status == 200
        silent, speaking, null = (request.sampling for request in backend.requests)
        assert (silent.temperature, silent.top_p, silent.top_k) == (0.6, 1.0, 20)
        assert (silent.repetition_penalty, silent.max_tokens) == (1.05, 7)
        assert (speaking.temperature, speaking.top_p, speaking.top_k, speaking.max_tokens) == (0, 0.5, 20, 9)
        assert null.repetition_penalty == 1.05

    play(story, defaults={"demo": advised})


def test_defaults_are_the_adapted_models_and_nobody_elses() -> None:
    async def story(app: Frontend, backend: FakeBackend) -> None:
        for name in ("demo", "adapted"):
            backend.models = {name: ModelCard(name, 200, ("sampling",), base="demo" if name == "adapted" else "")}
            client = await Client(app).ask("POST", "/v1/completions", {"model": name, "prompt": "water"})
            assert client.status == 200
            sampling = backend.requests[-1].sampling
            assert (sampling.temperature, sampling.repetition_penalty, sampling.max_tokens) == (0.6, 1.0, 16)

    play(story, defaults={"demo": Defaults(temperature=0.6, repetition_penalty=1.05), "other": Defaults(top_k=3)})
