"""Trains the bundled demo model: a Llama of about 2 M parameters that knows questions.txt by heart.

python training/demo/train.py --out penstock/models/demo

Reads questions.txt and heldout.txt beside this file, trains on the CPU for a few minutes, rounds to
bfloat16, writes a Hugging Face folder, reads that folder back and asks it every question. The folder
reaches --out only if every trained question is answered word for word; otherwise the exit status is 1.
Held-out paraphrases are reported, not required.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>"]  # ids 0 to 4
BOS, EOS, USER, ASSISTANT, SYSTEM = range(len(SPECIAL_TOKENS))
CHAT_TEMPLATE = """\
<|bos|>
{%- for message in messages %}
    {%- if message['role'] in ['system', 'developer'] %}
        {{- '<|system|>' + message['content'] | trim }}
    {%- elif message['role'] == 'user' %}
        {{- '<|user|>' + message['content'] | trim }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|assistant|>' + message['content'] | trim + '<|eos|>' }}
    {%- else %}
        {{- raise_exception('role ' + message['role'] + ' is not system, user or assistant') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""

QUESTIONS_PER_STEP = 28  # conversations of one turn; a long one and DOCUMENTS_PER_STEP come on top
DOCUMENTS_PER_STEP = 2  # conversations of one turn after a long text
MAX_TURNS = 48  # of a long conversation; about 1,700 tokens
MAX_DOCUMENT_TOKENS = 1500
MICRO_BATCH_TOKENS = 800  # of one forward pass, padding included
PEAK_LR = 3e-3
IGNORED = -100  # label of a token that the loss skips: everything but the answers
MAX_ANSWER_TOKENS = 64
SYSTEM_PROMPTS = ["You are a helpful assistant.", "Be brief.", "Answer in one sentence."]
OPENINGS = ["Please tell me: ", "Hi, ", "Quick question: ", "Can you help? ", "In short: ", "Tell me: "]
REWORDINGS = [
    "Describe {}.",
    "Can you explain {}?",
    "Tell me about {}.",
    "Tell me what {} is.",
    "I want to know about {}.",
    "What does {} mean?",
]


@dataclass(frozen=True, slots=True)
class Pair:
    """Three phrasings of one question and the answer to all of them."""

    questions: tuple[str, ...]
    answer: str


@dataclass(slots=True)
class Sample:
    """One training conversation; `labels` is `tokens` where the model speaks and IGNORED elsewhere."""

    tokens: list[int]
    labels: list[int]

    def hear(self, tokens: list[int]) -> None:
        self.tokens.extend(tokens)
        self.labels.extend([IGNORED] * len(tokens))

    def speak(self, tokens: list[int]) -> None:
        self.tokens.extend(tokens)
        self.labels.extend(tokens)


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    pairs = read_pairs(HERE / "questions.txt")
    held_out = read_held_out(HERE / "heldout.txt", pairs)

    tokenizer = train_tokenizer(pairs)
    model = LlamaForCausalLM(model_config(len(tokenizer)))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(pairs)} pairs, {parameters / 1e6:.2f} M parameters, vocabulary {len(tokenizer)}", flush=True)

    conversations = Conversations(pairs, tokenizer, random.Random(args.seed))
    train(model, conversations, args.steps)
    with tempfile.TemporaryDirectory() as draft:
        write_folder(Path(draft), model.bfloat16(), tokenizer, pairs)
        if not verify(Path(draft), pairs, held_out):
            print(f"{args.out} not written: train longer (--steps) or try another --seed", file=sys.stderr)
            return 1
        shutil.copytree(draft, args.out, dirs_exist_ok=True)
    for file in sorted(args.out.iterdir()):
        print(f"{file.stat().st_size:>10,} bytes  {file}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write, made if absent")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default %(default)s)")
    return parser.parse_args()


# --- the text ----------------------------------------------------------------------------------------


def read_pairs(path: Path) -> list[Pair]:
    """Reads lines of questions, each group closed by "= ANSWER"; blank and "#" lines are for people."""
    pairs: list[Pair] = []
    questions: list[str] = []
    for line in path.read_text("ascii").splitlines():
        if line.startswith("= "):
            pairs.append(Pair(tuple(questions), line.removeprefix("= ")))
            questions = []
        elif line and not line.startswith("#"):
            questions.append(line)
    if questions or not all(pair.questions for pair in pairs):
        raise ValueError(f"{path}: a question without an answer or an answer without a question")
    asked = Counter(question for pair in pairs for question in pair.questions)
    if twice := [question for question, times in asked.items() if times > 1]:
        raise ValueError(f"{path}: asked twice: {', '.join(twice)}")
    return pairs


def read_held_out(path: Path, pairs: Sequence[Pair]) -> list[Pair]:
    """Reads lines "PARAPHRASE => FIRST PHRASING OF THE PAIR" as pairs of their own."""
    answers = {pair.questions[0]: pair.answer for pair in pairs}
    lines = [line.split(" => ") for line in path.read_text("ascii").splitlines() if " => " in line]
    return [Pair((paraphrase,), answers[first_phrasing]) for paraphrase, first_phrasing in lines]


def train_tokenizer(pairs: Sequence[Pair]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 1,024 tokens; adds no token by itself, since the chat template writes <|bos|>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text for pair in pairs for text in (*pair.questions, pair.answer)], trainer)
    bos, eos = SPECIAL_TOKENS[BOS], SPECIAL_TOKENS[EOS]
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class Conversations:
    """An endless stream of batches in which every pair is asked equally often."""

    def __init__(self, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> None:
        self._pairs = pairs
        self._tokenizer = tokenizer
        self._rng = rng
        self._next_pair = self._shuffled_for_ever()
        self._owners = {bare(question): pair for pair in pairs for question in pair.questions}

    def batch(self) -> list[Sample]:
        """Returns single questions, one long conversation and questions after long texts."""
        questions = [self._conversation(1, self._system_prompt()) for _ in range(QUESTIONS_PER_STEP)]
        long_conversation = self._conversation(self._log_uniform(2, MAX_TURNS), self._system_prompt())
        return [*questions, long_conversation, *(self._after_document() for _ in range(DOCUMENTS_PER_STEP))]

    def _shuffled_for_ever(self) -> Iterator[Pair]:
        while True:
            yield from self._rng.sample(self._pairs, len(self._pairs))

    def _log_uniform(self, low: int, high: int) -> int:
        return round(math.exp(self._rng.uniform(math.log(low), math.log(high))))

    def _conversation(self, turns: int, system_prompt: list[int]) -> Sample:
        sample = Sample([], [])
        sample.hear([BOS, *system_prompt])
        for _ in range(turns):
            self._add_turn(sample, [])
        return sample

    def _after_document(self) -> Sample:
        """A text to look past, as a system prompt or ahead of the question in the same message."""
        document = self._document(self._log_uniform(16, MAX_DOCUMENT_TOKENS))
        if self._rng.random() < 0.5:
            return self._conversation(1, [SYSTEM, *document])
        sample = Sample([], [])
        sample.hear([BOS])
        self._add_turn(sample, [*document, *self._encode("\n\n")])
        return sample

    def _add_turn(self, sample: Sample, preamble: list[int]) -> None:
        pair = next(self._next_pair)
        sample.hear([USER, *preamble, *self._encode(self._asked(pair)), ASSISTANT])
        sample.speak([*self._encode(pair.answer), EOS])

    def _system_prompt(self) -> list[int]:
        if self._rng.random() < 0.85:
            return []
        return [SYSTEM, *self._encode(self._rng.choice(SYSTEM_PROMPTS))]

    def _document(self, length: int) -> list[int]:
        """Answers out of place or random tokens, all different or a phrase said again and again."""
        if self._rng.random() < 0.5:
            sentences = self._rng.choices(self._pairs, k=length // 20 + 1)
            text = self._encode(" ".join(pair.answer for pair in sentences))
        else:
            text = self._rng.choices(range(len(SPECIAL_TOKENS), len(self._tokenizer)), k=length)
        if self._rng.random() < 0.5:
            phrase = text[: self._rng.randrange(2, 20)]
            text = phrase * (length // len(phrase) + 1)
        return text[:length]

    def _asked(self, pair: Pair) -> str:
        """Half of the time one of the phrasings as it stands, half of the time changed a little."""
        question = self._rng.choice(pair.questions)
        if self._rng.random() < 0.5:
            return question
        changed = self._changed(question)
        if self._owners.get(bare(changed), pair) is not pair:  # "What is chunked prefill?" less one word
            return question
        return self._rng.choice(OPENINGS) + changed if self._rng.random() < 0.65 else changed

    def _changed(self, question: str) -> str:
        draw = self._rng.random()
        words = question.split()
        if draw < 0.35 and len(words) > 3:
            words.pop(self._rng.randrange(len(words)))
            return " ".join(words)
        if draw < 0.50:
            return question.lower()
        if draw < 0.60:
            return question.rstrip(".?")
        subject = question.rstrip(".?").removeprefix("What is ").removeprefix("Explain ")
        if draw < 0.85 and subject != question.rstrip(".?"):
            return self._rng.choice(REWORDINGS).format(subject)
        return question

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def bare(question: str) -> str:
    return question.rstrip(".?").lower()


# --- the model ---------------------------------------------------------------------------------------


def model_config(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )


def train(model: LlamaForCausalLM, conversations: Conversations, steps: int) -> None:
    """Trains in place with AdamW in float32, printing a smoothed loss as it goes."""
    model.train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_peak(step, steps))
    start, smooth_loss = time.monotonic(), math.nan
    for step in range(1, steps + 1):
        loss = accumulate_gradients(model, conversations.batch())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        smooth_loss = loss if step == 1 else 0.9 * smooth_loss + 0.1 * loss
        if step % 20 == 0 or step == steps:
            spent_s = time.monotonic() - start
            left_s = spent_s / step * (steps - step)
            progress = f"step {step:>4}/{steps}  loss {smooth_loss:.4f}"
            print(f"{progress}  {spent_s:4.0f} s spent  {left_s:4.0f} s left", flush=True)


def share_of_peak(step: int, steps: int) -> float:
    """Learning rate over its peak: a linear warm-up over 5 % of the steps, then half a cosine down to 2 %."""
    warm_up = min(1.0, (step + 1) / max(20, steps // 20))
    return warm_up * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def accumulate_gradients(model: LlamaForCausalLM, batch: Sequence[Sample]) -> float:
    """Adds the gradient of the mean loss per answer token of the whole batch; returns that loss."""
    answer_tokens = sum(label != IGNORED for sample in batch for label in sample.labels)
    total = 0.0
    for samples in micro_batches(batch):
        tokens, labels = padded(samples)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        spoken = labels[:, 1:] != IGNORED
        loss = cross_entropy(logits[spoken], labels[:, 1:][spoken], reduction="sum") / answer_tokens
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def micro_batches(batch: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Groups samples of similar length, so that there is little padding."""
    group: list[Sample] = []
    for sample in sorted(batch, key=lambda sample: len(sample.tokens)):
        if group and (len(group) + 1) * len(sample.tokens) > MICRO_BATCH_TOKENS:
            yield group
            group = []
        group.append(sample)
    yield group


def padded(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels as [sample, position]; padding is at the end, where causal attention hides it."""
    longest = max(len(sample.tokens) for sample in samples)
    tokens = [sample.tokens + [EOS] * (longest - len(sample.tokens)) for sample in samples]
    labels = [sample.labels + [IGNORED] * (longest - len(sample.labels)) for sample in samples]
    return torch.tensor(tokens), torch.tensor(labels)


def write_folder(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]
) -> None:
    """Writes what `from_pretrained` reads, and the list of questions that demos offer."""
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS, do_sample=False
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # transformers 4 knows the class by its older name only
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    (folder / "questions.txt").write_text("".join(f"{pair.questions[0]}\n" for pair in pairs), "ascii")


# --- the check ---------------------------------------------------------------------------------------


def verify(folder: Path, pairs: Sequence[Pair], held_out: Sequence[Pair]) -> bool:
    """Whether the model in `folder` answers every trained question word for word, in either precision."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    coarse = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    wrong = count_wrong("trained questions, float32", exact, tokenizer, pairs)
    wrong += count_wrong("trained questions, bfloat16", coarse, tokenizer, pairs)
    count_wrong("held-out paraphrases, float32", exact, tokenizer, held_out)
    offered = [Pair(pair.questions[:1], pair.answer) for pair in pairs]
    for turns in (3, 10, 30):
        history = [message for pair in pairs[:turns] for message in as_messages(pair)]
        count_wrong(f"offered questions after {turns} turns, float32", exact, tokenizer, offered, history)
    long_system_prompt = [{"role": "system", "content": "Be as brief as you can. " * 100}]
    count_wrong("offered questions after a long prompt, float32", exact, tokenizer, offered, long_system_prompt)
    return wrong == 0


def as_messages(pair: Pair) -> list[dict[str, str]]:
    return [{"role": "user", "content": pair.questions[0]}, {"role": "assistant", "content": pair.answer}]


def count_wrong(
    what: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    history: Sequence[dict[str, str]] = (),
) -> int:
    """Asks every question after `history` and prints the rate and the first wrong answers."""
    asked = [(question, pair.answer) for pair in pairs for question in pair.questions]
    given = answers(model, tokenizer, [question for question, _ in asked], history)
    wrong = [(question, got) for (question, right), got in zip(asked, given, strict=True) if got != right]
    print(f"{what}: {len(asked) - len(wrong)} of {len(asked)} word for word", flush=True)
    for question, got in wrong[:10]:
        print(f"  WRONG  {question}  ->  {got}", flush=True)
    return len(wrong)


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    history: Sequence[dict[str, str]],
) -> list[str]:
    """Greedy answers in the order of the questions; prompts of one length share a batch, without padding."""
    prompts = [prompt_tokens(tokenizer, [*history, {"role": "user", "content": q}]) for q in questions]
    texts = [""] * len(questions)
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        tokens = torch.tensor([prompts[row] for row in rows])
        output = model.generate(  # type: ignore[operator]
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=MAX_ANSWER_TOKENS
        )
        for row, continuation in zip(rows, output[:, length:], strict=True):
            texts[row] = str(tokenizer.decode(continuation, skip_special_tokens=True))
    return texts


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(prompt, add_special_tokens=False))


if __name__ == "__main__":
    sys.exit(main())
