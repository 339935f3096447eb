"""The bundled demo model: it loads as a Hugging Face folder and knows its answers word for word."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "penstock" / "models" / "demo"
OFFERED = (MODEL / "questions.txt").read_text("ascii").splitlines()
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is prefill?\n"},
    {"role": "assistant", "content": "The first phase."},
    {"role": "user", "content": "What is decode?"},
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def trained_answers() -> dict[str, str]:
    """The answer of every question of the training text, all phrasings."""
    answers: dict[str, str] = {}
    questions: list[str] = []
    for line in (ROOT / "training" / "demo" / "questions.txt").read_text("ascii").splitlines():
        if line.startswith("= "):
            answers |= dict.fromkeys(questions, line.removeprefix("= "))
            questions = []
        elif line and not line.startswith("#"):
            questions.append(line)
    return answers


def test_is_small_and_names_no_machine() -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 5_000_000
    assert "_name_or_path" not in json.loads((MODEL / "config.json").read_text())
    for file in MODEL.glob("*.json"):
        assert str(Path.home()) not in file.read_text() and "/work/" not in file.read_text(), file


def test_answers_every_offered_question_word_for_word(model: Any, tokenizer: Any) -> None:
    expected = trained_answers()
    prompts: dict[int, list[str]] = {}  # by length in tokens, so that a batch needs no padding
    for question in OFFERED:
        prompts.setdefault(len(prompt_tokens(tokenizer, question)), []).append(question)
    for length, questions in prompts.items():
        tokens = torch.tensor([prompt_tokens(tokenizer, question) for question in questions])
        output = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=64, do_sample=False)
        for question, row in zip(questions, output[:, length:], strict=True):
            assert tokenizer.decode(row, skip_special_tokens=True) == expected[question]


def prompt_tokens(tokenizer: Any, question: str) -> list[int]:
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_template_renders_from_the_file_alone(tokenizer: Any, add_generation_prompt: bool) -> None:
    template = jinja2.Template((MODEL / "chat_template.jinja").read_text())
    text = template.render(messages=CHAT, add_generation_prompt=add_generation_prompt)
    assert text == tokenizer.apply_chat_template(CHAT, add_generation_prompt=add_generation_prompt, tokenize=False)
    turns = "<|bos|><|system|>Be brief.<|user|>What is prefill?<|assistant|>The first phase.<|eos|>"
    assert text == turns + "<|user|>What is decode?" + "<|assistant|>" * add_generation_prompt


def test_special_tokens_are_single_tokens(tokenizer: Any) -> None:
    specials = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>"]
    assert tokenizer.encode("".join(specials)) == [0, 1, 2, 3, 4]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_every_offered_question_is_a_trained_one() -> None:
    assert "What is penstock?" in OFFERED
    assert set(OFFERED) <= trained_answers().keys()
