"""What is asked, what comes back, and where the time went. Everything here crosses process boundaries."""

from __future__ import annotations

from typing import Literal

import msgspec

from penstock.tokens import count

FinishReason = Literal["stop", "length", "abort"]
Label = tuple[str, str]  # of a worker: name and value, such as zone and a


class Guide(msgspec.Struct, frozen=True):
    """What the output must look like. `text` is the schema, as JSON, or the expression, or the grammar."""

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    text: str = ""  # of "choice": a JSON array of strings; of "json_object": nothing


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How output tokens are chosen; names and meanings are vLLM's.

    A token is a function of the logits, of this, of the tokens before it and of (seed, choice, position) alone.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # in (0, 1]
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0  # in [0, 1]: drops tokens that are less likely than the likeliest times this
    repetition_penalty: float = 1.0  # over 0; above 1 makes tokens of prompt and output less likely
    presence_penalty: float = 0.0  # in [-2, 2]: taken from the logits of tokens that the output has
    frequency_penalty: float = 0.0  # in [-2, 2]: the same, once for each time
    seed: int = 0  # the frontend draws one where the client gave none
    choice: int = 0  # index among the choices of one request
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0  # as long as the output is shorter, no token that would end it is chosen
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of tokens whose last is not chosen after the others
    logprobs: int | None = None  # None: none; n: the chosen token's and the n likeliest
    prompt_logprobs: int | None = None  # the same of the prompt's tokens but the first
    guide: Guide | None = None


class Progress(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far a sequence has come: with the request, all that its next token depends on.

    Who continues a sequence elsewhere starts from this. What else sampling may come to depend on, such as penalties or
    the state of a grammar, is either a function of these tokens or belongs here.
    """

    tokens: bytes = b""  # of the output, see `tokens.pack`; the client has them

    @property
    def count(self) -> int:
        return count(self.tokens)


class Constraints(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a request may go, where it should, and when it is its turn. By default anywhere, first come first served.

    Tenants share what there is, see `policy.fair_queue`. Requests of one session should meet at one worker.
    """

    require: tuple[Label, ...] = ()  # each of its workers has them all
    prefer: tuple[Label, ...] = ()  # the first matters most
    session: str = ""
    adapter: str = ""  # each of its workers has it
    tenant: str = ""
    priority: int = 0  # lower first


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """One sequence to generate, as it travels from the frontend to a decode worker."""

    id: str
    model: str
    prompt: bytes  # token ids, see `tokens.pack`
    sampling: Sampling
    timeout_s: float = 600.0  # from arrival at the frontend; an interval, since clocks of hosts differ
    salt: str = ""  # keeps the cached blocks of tenants and adapters apart
    progress: Progress = Progress()
    constraints: Constraints = Constraints()

    @property
    def prompt_tokens(self) -> int:
        return count(self.prompt)

    @property
    def sequence(self) -> bytes:
        """The prompt and the output so far, packed."""
        return self.prompt + self.progress.tokens

    @property
    def sequence_tokens(self) -> int:
        return self.prompt_tokens + self.progress.count


class Token(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """One output token. Log probabilities are natural logs of the model's own distribution."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Hop(msgspec.Struct, frozen=True, array_like=True):
    """A worker as another one must know it to call it. `epoch` is its incarnation."""

    worker: str
    epoch: int
    addresses: tuple[str, ...]

    @property
    def incarnation(self) -> str:
        """What leases and transports know it by."""
        return f"{self.worker}:{self.epoch}"


class Plan(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the router decided. `prefill` lists whom the decode worker should call, best first; none: itself.

    `prefill_wait_s` is how long the first of them was expected to be busy with others, and `prefill_cached_tokens` how
    much of the prompt its own cache is believed to hold.
    """

    decode: str
    prefill: tuple[Hop, ...] = ()
    prefill_wait_s: float = 0.0
    prefill_cached_tokens: int = 0
    why: str = ""


class Timeline(msgspec.Struct, omit_defaults=True):
    """What happened to one sequence. Times are seconds after its arrival at the frontend, `None`: not reached.

    The decode worker fills its part relative to arrival there; the frontend shifts it by `reached_worker_s`.
    """

    decode_worker: str = ""
    prefill_worker: str = ""
    path: str = ""  # how prefilled KV reached the decode worker: "local", "in-place", "streamed"
    why: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0  # prompt tokens computed, by whomever; more than once if retried
    moved_tokens: int = 0  # prompt tokens whose KV another worker made
    copied_bytes: int = 0  # bytes of KV that the hand-over copied, over `transport` and in `moving_s` seconds
    transport: str = ""
    moving_s: float = 0.0
    fetched_tokens: int = 0  # prompt tokens whose KV a prefill worker copied from the decode worker
    output_tokens: int = 0
    prefill_attempts: int = 0
    preemptions: int = 0
    moves: int = 0  # to another decode worker, in mid-stream
    reached_worker_s: float | None = None
    prefill_started_s: float | None = None  # end of queueing
    prefill_ended_s: float | None = None  # end of the last chunk
    first_token_s: float | None = None
    decoding_s: float | None = None  # end of the first decode step, which reads the KV of the whole prompt
    ended_s: float | None = None
    failures: list[str] = []  # what was tried and failed on the way


class Finish(msgspec.Struct, frozen=True, omit_defaults=True):
    """The end of one sequence. `stop_token` is the token id that ended it, if one did."""

    reason: FinishReason
    timeline: Timeline
    stop_token: int | None = None
