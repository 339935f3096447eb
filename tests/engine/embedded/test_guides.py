"""Guides hold whatever a model says, here random logits, to what they describe; and do not disturb anybody else."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from penstock import grammar
from penstock.engine import embedded_guides
from penstock.engine.api import Past, SequencesFailed
from penstock.engine.embedded import EmbeddedEngine, Options
from penstock.engine.embedded_guides import Guides, read_tokenizer
from penstock.engine.embedded_sampling import Draw, Sampler
from penstock.errors import BadRequest, Unsupported
from penstock.request import Guide, Sampling
from penstock.serve.text import load_tokenizer
from tests.models import VOCABULARY
from tests.serve.tokenizers_made import byte_level, sentencepiece, write_folder

EOS = 0
MOST = 400  # tokens of an output, more than any here takes

FREE = None
NUMBER = Guide("regex", r"-?\d{1,4}(\.\d+)?")
CHOICE = Guide("choice", json.dumps(["yes", "no", "maybe (not)", "œuvre/🙂"]))
NESTED = Guide("grammar", 'root ::= "(" root ")" | [a-z]{1,3}')
LARK = Guide("grammar", 'start: "<" NAME ">"\nNAME: /[a-z]+/')
OBJECT = Guide("json_object")
PERSON = Guide(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    ),
)


def is_person(text: str) -> bool:
    person = json.loads(text)
    return set(person) == {"name", "age"} and len(person["name"]) <= 8 and person["age"] >= 0


ACCEPTED: dict[Guide, Callable[[str], object]] = {
    NUMBER: lambda text: re.fullmatch(NUMBER.text, text),
    CHOICE: lambda text: text in json.loads(CHOICE.text),
    NESTED: lambda text: re.fullmatch(r"(\(*)[a-z]{1,3}(\)*)", text) and text.count("(") == text.count(")"),
    LARK: lambda text: re.fullmatch("<[a-z]+>", text),
    OBJECT: lambda text: isinstance(json.loads(text), dict),
    PERSON: is_person,
}
GUIDES = list(ACCEPTED)


@dataclass(frozen=True)
class Model:
    """Random logits, a function of the seed and the position, that lean to what closes a text."""

    folder: Path
    codec: Tokenizer

    def sampler(self) -> Sampler:
        return Sampler((EOS,), Guides(read_tokenizer(str(self.folder), VOCABULARY, (EOS,))))

    def text(self, ids: Sequence[int]) -> str:
        text: str = self.codec.decode(list(ids))
        return text

    def logits(self, seed: int, position: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + position)
        logits = 3 * torch.randn(VOCABULARY, generator=generator)
        logits[[self.codec.token_to_id(closing) for closing in '"}]']] += 4
        return logits


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Model:
    folder = checkpoint("llama")
    return Model(folder, Tokenizer.from_file(str(folder / "tokenizer.json")))


def a_past(name: str, output: Sequence[int] = ()) -> Past:
    return Past(name, array("I", [5, 6, *output]), 2)


def step(model: Model, sampler: Sampler, rows: Sequence[tuple[Sampling, Past]]) -> list[int]:
    """One token for each, by the random logits of its seed; appended to its past."""
    logits = torch.stack([model.logits(sampling.seed, len(past.tokens)) for sampling, past in rows])
    tokens = sampler.sample(logits, [Draw(sampling, len(past.tokens), past) for sampling, past in rows])
    for (_, past), token in zip(rows, tokens, strict=True):
        past.tokens.append(token.id)
    return [token.id for token in tokens]


def complete(model: Model, sampling: Sampling, sampler: Sampler | None = None) -> list[int]:
    """The output without its EOS. Fails if it does not end."""
    sampler, past = sampler or model.sampler(), a_past("alone")
    while step(model, sampler, [(sampling, past)]) != [EOS]:
        assert len(past.output) < MOST
    return past.output[:-1].tolist()


def guided(guide: Guide | None, seed: int, temperature: float = 1.0, **more: object) -> Sampling:
    return Sampling(max_tokens=MOST, temperature=temperature, seed=seed, guide=guide, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.kind)
def test_outputs_are_what_the_guide_says(model: Model, guide: Guide, temperature: float) -> None:
    outputs = {model.text(complete(model, guided(guide, seed, temperature))) for seed in range(8)}
    assert all(ACCEPTED[guide](output) for output in outputs)
    assert len(outputs) > 1


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.kind)
def test_without_the_guide_they_are_not(model: Model, guide: Guide) -> None:
    """The negative control."""
    sampler, past = model.sampler(), a_past("free")
    for _ in range(12):
        step(model, sampler, [(guided(FREE, 1), past)])
    with pytest.raises((AssertionError, ValueError)):
        assert ACCEPTED[guide](model.text(past.output))


# Schemas


def conforms(value: object, schema: dict[str, object]) -> bool:
    """For the schemas below."""
    match schema:
        case {"enum": list(values)}:
            return value in values
        case {"anyOf": list(options)}:
            return any(conforms(value, option) for option in options)
        case {"type": "array", "items": dict(items), "minItems": int(least), "maxItems": int(most)}:
            return isinstance(value, list) and least <= len(value) <= most and all(conforms(v, items) for v in value)
        case {"type": "object", "properties": dict(properties), "required": list(required)}:
            return (
                isinstance(value, dict)
                and set(required) <= set(value) <= set(properties)
                and all(conforms(v, properties[k]) for k, v in value.items())
            )
        case {"type": "string", "maxLength": int(most)}:
            return isinstance(value, str) and len(value) <= most
        case {"type": "integer", "minimum": int(least), "maximum": int(most)}:
            return type(value) is int and least <= value <= most
        case {"type": "number"}:
            return type(value) in (int, float)
        case {"type": "boolean"}:
            return type(value) is bool
    raise AssertionError(f"no such schema is made here: {schema}")


names = st.text('abcé"\\ \n🙂', max_size=4)
leaves: st.SearchStrategy[dict[str, object]] = st.one_of(
    st.just({"type": "number"}),
    st.just({"type": "boolean"}),
    st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 6)),
    st.builds(
        lambda least, span: {"type": "integer", "minimum": least, "maximum": least + span},
        st.integers(-1000, 1000),
        st.integers(0, 300),
    ),
    st.builds(
        lambda values: {"enum": values}, st.lists(names | st.integers(-5, 5) | st.none(), min_size=1, max_size=3)
    ),
)


@st.composite
def objects(draw: st.DrawFn, values: st.SearchStrategy[dict[str, object]]) -> dict[str, object]:
    properties = draw(st.dictionaries(names, values, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def larger(values: st.SearchStrategy[dict[str, object]]) -> st.SearchStrategy[dict[str, object]]:
    arrays = st.builds(
        lambda items, least, span: {"type": "array", "items": items, "minItems": least, "maxItems": least + span},
        values,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    return arrays | objects(values) | st.builds(lambda one, two: {"anyOf": [one, two]}, values, values)


@settings(max_examples=150, deadline=None)
@given(
    schema=st.recursive(leaves, larger, max_leaves=6), seed=st.integers(0, 1000), temperature=st.sampled_from([0, 1])
)
def test_json_conforms_to_any_schema(model: Model, schema: dict[str, object], seed: int, temperature: float) -> None:
    guide = Guide("json_schema", json.dumps(schema))
    text = model.text(complete(model, guided(guide, seed, temperature)))
    assert conforms(json.loads(text), schema)


# Neighbours, and state that can always be found again


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_do_not_disturb_each_other(model: Model, temperature: float) -> None:
    samplings = [guided(guide, seed, temperature) for seed, guide in enumerate([FREE, *GUIDES, PERSON, FREE, PERSON])]
    alone: list[list[int]] = []
    for sampling in samplings:
        sampler, past = model.sampler(), a_past("alone")
        while not past.output or (past.output[-1] != EOS and len(past.output) < 60):
            step(model, sampler, [(sampling, past)])
        alone.append(past.output.tolist())

    sampler = model.sampler()
    pasts = [a_past(f"s{row}") for row in range(len(samplings))]
    running = list(zip(samplings, pasts, strict=True))
    while running:
        step(model, sampler, running)
        running = [(s, past) for s, past in running if past.output[-1] != EOS and len(past.output) < 60]
        running.reverse()
    assert [past.output.tolist() for past in pasts] == alone


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.kind)
def test_whoever_continues_a_sequence_finds_its_state(model: Model, guide: Guide) -> None:
    """A new worker for every token, against one that kept its matcher."""
    sampling = guided(guide, 3)
    kept = complete(model, sampling)
    past = a_past("moving")
    while step(model, model.sampler(), [(sampling, past)]) != [EOS]:
        pass
    assert past.output[:-1].tolist() == kept


def test_a_name_that_comes_back_with_another_output_or_guide_starts_afresh(model: Model) -> None:
    sampler = model.sampler()
    for guide, seed in ((PERSON, 1), (PERSON, 2), (NUMBER, 3), (PERSON, 3)):
        assert complete(model, guided(guide, seed), sampler) == complete(model, guided(guide, seed))


def test_more_sequences_than_are_kept(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [complete(model, guided(guide, 5)) for guide in GUIDES]
    monkeypatch.setattr(embedded_guides, "_FOLLOWED", 2)
    monkeypatch.setattr(embedded_guides, "_COMPILED", 2)
    sampler = model.sampler()
    pasts = {guide: a_past(guide.text + guide.kind) for guide in GUIDES}
    while running := [guide for guide in GUIDES if EOS not in pasts[guide].output]:
        step(model, sampler, [(guided(guide, 5), pasts[guide]) for guide in running])
    assert [pasts[guide].output[:-1].tolist() for guide in GUIDES] == alone


def test_lexers_are_kept_of_so_many_guides_and_of_those_in_a_step(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may take megabytes, and every request may bring a guide of its own."""
    monkeypatch.setattr(embedded_guides, "_COMPILED", 4)
    sampler, running = model.sampler(), [(guided(PERSON, seed), a_past(f"r{seed}")) for seed in range(3)]
    for length in range(1, 30):
        passing = guided(Guide("regex", f"[a-z]{{{length}}}"), 1), a_past(f"s{length}")
        step(model, sampler, [*running, passing])
    lexers = {id(followed.compiled) for followed in sampler._guides._followed.values()}
    assert 4 <= len(lexers) <= 4 + 1 + 1  # and that of those that run, and the last one
    assert {past.sequence for _, past in running} <= set(sampler._guides._followed)


# Ends


def test_eos_waits_for_the_guide_and_alone_is_left_after_it(model: Model) -> None:
    sampler = model.sampler()
    ab = Guide("regex", "ab?")
    a, b = (model.codec.token_to_id(name) for name in "ab")

    def allowed(*output: int) -> set[int]:
        """What can come after this output, of very many draws."""
        logits = torch.zeros(1, VOCABULARY)
        return {sampler.sample(logits, [Draw(guided(ab, seed), 9, a_past("s", output))])[0].id for seed in range(40)}

    assert a in allowed() and EOS not in allowed()
    assert allowed(a) == {b, EOS}
    assert allowed(a, b) == {EOS}


def test_min_tokens_and_bad_words_give_way_to_a_guide_that_allows_nothing_else(model: Model) -> None:
    letters = Guide("regex", "[a-f]{4}")
    bad = [(token,) for token in range(VOCABULARY) if re.fullmatch("[a-f]+", model.text([token]))]
    outputs = {model.text(complete(model, guided(letters, n, min_tokens=50, bad_words=tuple(bad)))) for n in range(4)}
    assert all(re.fullmatch(letters.text, output) for output in outputs) and len(outputs) > 1


def test_min_tokens_keep_a_guide_going_that_can_go_on(model: Model) -> None:
    digits = Guide("regex", "[0-9]+")
    assert min(len(complete(model, guided(digits, seed, min_tokens=30))) for seed in range(4)) >= 30


def test_stop_tokens_are_no_way_out(model: Model) -> None:
    stops = tuple(range(1, VOCABULARY, 2))
    sampler, past = model.sampler(), a_past("s")
    while step(model, sampler, [(guided(OBJECT, 2, stop_token_ids=stops), past)]) != [EOS]:
        pass
    assert ACCEPTED[OBJECT](model.text(past.output))


def test_with_ignore_eos_the_output_is_free_after_the_end(model: Model) -> None:
    sampler, past = model.sampler(), a_past("s")
    for _ in range(60):
        step(model, sampler, [(guided(CHOICE, 1, ignore_eos=True), past)])
    end = past.output.index(EOS)
    assert ACCEPTED[CHOICE](model.text(past.output[:end]))
    assert len(set(past.output[end:])) > 10


def test_logprobs_are_the_models_own(model: Model) -> None:
    past = a_past("s")
    logits = model.logits(1, len(past.tokens))
    (token,) = model.sampler().sample(logits[None], [Draw(guided(PERSON, 1, logprobs=3), 2, past)])
    own = logits.log_softmax(-1)
    assert token.logprob == pytest.approx(own[token.id].item())
    assert [top for top, _ in token.top] == own.topk(3).indices.tolist()


# Failures


def test_a_guide_that_cannot_be_followed_names_its_sequence(model: Model) -> None:
    """The others go on without it."""
    late = Guide("grammar", 'start: s "b"\ns: s s s | s s | "a"')  # too many readings of "aaaa" and so on
    bias = ((model.codec.token_to_id("a"), 100.0),)
    samplings = [guided(PERSON, 1), guided(late, 1, logit_bias=bias), guided(FREE, 1)]
    rows = list(zip(samplings, map(a_past, ("good", "bad", "free")), strict=True))
    sampler = model.sampler()
    with pytest.raises(SequencesFailed) as caught:
        while len(rows[0][1].output) < MOST:
            step(model, sampler, rows)
    assert list(caught.value.errors) == ["bad"]
    assert isinstance(caught.value.errors["bad"], BadRequest)
    outputs = len(rows[0][1].output)
    step(model, sampler, [rows[0], rows[2]])
    assert len(rows[0][1].output) == len(rows[2][1].output) == outputs + 1


def test_an_output_that_the_guide_forbids_is_refused(model: Model) -> None:
    with pytest.raises(SequencesFailed):
        step(model, model.sampler(), [(guided(NUMBER, 1), a_past("s", [EOS + 1]))])


def test_a_full_lexer_is_no_fault_of_who_comes_next(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of one guide share a lexer; what is too much for all together is not too much for each."""
    wide = Guide("regex", r"([a-z]|[0-9]){100}")
    first = a_past("first")
    sampler = model.sampler()
    step(model, sampler, [(guided(wide, 1), first)])
    followed = sampler._guides._followed["first"]
    followed.matcher.consume_token(EOS)  # breaks it, as a full lexer does
    assert followed.matcher.is_error()
    step(model, sampler, [(guided(wide, 1), first)])
    assert re.fullmatch("[a-z0-9]+", model.text(first.output))


# Tokenizers


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_tokens_are_the_bytes_that_clients_get(tmp_path: Path, make: Callable[[], Tokenizer]) -> None:
    codec = make()
    folder = write_folder(tmp_path, codec)
    size = codec.get_vocab_size(with_added_tokens=True)
    end = codec.token_to_id("</s>")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = read_tokenizer(str(folder), size + 9, (end,))
    assert tokenizer is not None and tokenizer.vocab_size == size + 9
    special = {token for token, added in codec.get_added_tokens_decoder().items() if added.special}
    ours = load_tokenizer(folder, "m")
    anything = grammar.compile_guide(Guide("regex", "(?s:.*)"), tokenizer)
    for token in range(size):
        if token not in special and (spelt := ours.spell(token)) != b"\xff":  # which is part of no text
            assert tokenizer.decode_bytes([token]) == spelt
    mask = anything.compute_bitmask()
    allowed = {token for token in range(8 * len(mask)) if mask[token // 8] >> token % 8 & 1}
    assert allowed & special == {end} and max(allowed) < size


def test_models_that_cannot_be_guided_say_so(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint("llama")
    for path in folder.iterdir():
        if path.name != "tokenizer.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert "guide" in EmbeddedEngine(Options(str(folder), device="cpu")).info.supports
    assert "guide" not in EmbeddedEngine(Options(str(tmp_path), device="cpu")).info.supports
    assert read_tokenizer(str(folder), VOCABULARY, ()) is None
    assert read_tokenizer(str(folder), VOCABULARY, (40,)) is None  # text like any other
    (tmp_path / "tokenizer.json").write_text("{}")
    assert read_tokenizer(str(tmp_path), VOCABULARY, (EOS,)) is None
    with pytest.raises(SequencesFailed) as caught:
        Sampler((EOS,)).sample(torch.zeros(1, VOCABULARY), [Draw(guided(PERSON, 1), 2, a_past("s"))])
    assert isinstance(caught.value.errors["s"], Unsupported)


def test_a_tokenizer_with_more_tokens_than_the_model(checkpoint: Callable[[str], Path]) -> None:
    tokenizer = read_tokenizer(str(checkpoint("llama")), VOCABULARY - 20, (EOS,))
    sampler = Sampler((EOS,), Guides(tokenizer))
    logits = torch.zeros(1, VOCABULARY - 20)
    assert sampler.sample(logits, [Draw(guided(PERSON, 1), 2, a_past("s"))])[0].id < VOCABULARY - 20
