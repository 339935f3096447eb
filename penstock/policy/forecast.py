"""What a choice of workers will cost in seconds, whichever policy made it and whatever that policy makes small."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.policy.routing.api import Ask, Choice, Fleet, decode_s


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a request would meet if it were routed now: `first_s` until its first token, `own_s` if it were alone.

    It leaves `tokens` to compute. All workers that it may go to can compute `tokens_per_s` together: a policy that has
    decode workers compute no prompts gets less out of them.
    """

    first_s: float
    own_s: float
    tokens: int
    tokens_per_s: float


def forecast(ask: Ask, fleet: Fleet, choice: Choice) -> Forecast:
    """Of `choice`, made for `ask` from `fleet`. It waits for the prompts queued where its own is computed."""
    decode = fleet.names.index(choice.decode)
    prefill = fleet.names.index(choice.prefill[0]) if choice.prefill else decode
    holder = decode if fleet.shares_memory(prefill, decode) else prefill
    tokens, cached = float(ask.uncached_tokens[holder]), float(ask.cached_tokens[holder])
    own_s = float(fleet.prompt_s_at(prefill, tokens, cached) + ask.restore_s[holder])
    own_s += float(fleet.path(prefill).start_s[decode]) if prefill != decode else 0.0
    return Forecast(
        first_s=float(fleet.wait_s[prefill]) + own_s,
        own_s=own_s,
        tokens=int(tokens),
        tokens_per_s=float(fleet.prefill_tokens_per_s[fleet.usable].sum()),
    )


def price_s(ask: Ask, fleet: Fleet, choice: Choice) -> float:
    """Seconds until the first token, for moving KV, and that streams already there add to the output."""
    decode = fleet.names.index(choice.decode)
    price = forecast(ask, fleet, choice).first_s + float(decode_s(ask, fleet)[decode])
    if choice.prefill:
        byte_s = fleet.path(fleet.names.index(choice.prefill[0])).byte_s[decode]
        price += float(byte_s * ask.token_bytes * ask.uncached_tokens[decode])
    return price
