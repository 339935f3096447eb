"""Guides, compiled by llguidance: matchers that say which tokens may come next.

The frontend refuses with this what no engine could follow, before it asks a worker; the embedded engine follows it. It
is therefore bounded: by the size of a guide here, and by llguidance's limits on lexer and parser, which count work and
not time, so that a guide which would blow up fails alike everywhere. llguidance is imported when first needed.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import msgspec

from penstock.errors import BadRequest
from penstock.request import Guide

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# Characters of a guide's text. What compiling costs grows faster than these for grammars and expressions.
MOST_CHARS = {"json_schema": 1 << 16, "json_object": 0, "regex": 1 << 13, "choice": 1 << 16, "grammar": 1 << 13}
MOST_PROPERTIES = 500  # of all objects of a schema: merging them takes time in the square of their number

_ASCII = "dw"  # \d and \w mean ASCII in expressions, as they do in schemas

# Between tokens of JSON where a schema does not say it itself (`x-guidance`): a space, or up to two line breaks and an
# indent. Endless whitespace is where models that are lost in a schema spend the rest of their tokens.
_WHITESPACE = r" |\n{1,2}[ \t]{0,20}"


def check(guide: Guide, field: str) -> None:
    """Raises BadRequest, which names `field`, if the guide is no guide, has no output, or costs too much.

    Some grammars show only with the tokens of a model, or late in the output, that they cost too much.
    """
    try:
        _try(guide)
    except BadRequest as error:
        raise BadRequest(f"{field}: {error}", field) from None


@lru_cache(maxsize=128)
def _try(guide: Guide) -> None:
    """Up to the first token. Guides that pass are remembered: clients send the same ones again and again."""
    matcher = compile_guide(guide, _bytes())
    _refuse_special_tokens(guide)
    matcher.compute_bitmask()
    raise_error_of(matcher)


def compile_guide(guide: Guide, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the start of the output. Raises BadRequest."""
    from llguidance import LLMatcher

    if len(guide.text) > MOST_CHARS[guide.kind]:
        raise BadRequest(f"a {guide.kind} has {MOST_CHARS[guide.kind]} characters at most, this one {len(guide.text)}")
    limits = _limits(guide.kind == "grammar")
    try:
        grammar = _grammar_of(guide)
    except ValueError as error:  # of a schema that is nested too deep for the library, say
        raise BadRequest(f"it cannot be followed: {error}") from None
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    raise_error_of(matcher)
    return matcher


def raise_error_of(matcher: LLMatcher) -> None:
    """Raises BadRequest if the matcher failed, after which it allows nothing but the end."""
    if matcher.is_error():
        reason = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())
        raise BadRequest(f"it cannot be followed: {reason[:300]}")


@cache
def _bytes() -> LLTokenizer:
    """Stands for any model's tokenizer: one token for each byte."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


@cache
def _limits(may_be_ambiguous: bool) -> LLParserLimits:
    """What costs most is a parser that follows many readings at once; only a grammar of one's own leads there."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=100_000,
        step_lexer_fuel=50_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        max_items_in_row=500 if may_be_ambiguous else 2_000,
        step_max_items=20_000,
        verbose_errors=False,
    )


def _grammar_of(guide: Guide) -> str:
    """In llguidance's own words."""
    from llguidance import LLMatcher, regex_to_lark

    match guide.kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema('{"type":"object"}', {"whitespace_pattern": _WHITESPACE})
        case "json_schema":
            _refuse_many_properties(guide.text)
            return LLMatcher.grammar_from_json_schema(guide.text, {"whitespace_pattern": _WHITESPACE})
        case "regex":
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(guide.text, _ASCII)}/")
        case "choice":
            return LLMatcher.grammar_from_regex("|".join(map(_literally, _choices(guide.text))))
        case "grammar":
            return LLMatcher.grammar_from_lark(_lark(guide.text))


def _refuse_many_properties(schema: str) -> None:
    try:
        unseen = [msgspec.json.decode(schema)]
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"the schema is no JSON, or too deep: {error}") from None
    if not isinstance(unseen[0], dict):
        raise BadRequest("the schema must be a JSON object")
    properties = 0
    while unseen:
        value = unseen.pop()
        if isinstance(value, dict):
            own = value.get("properties")
            properties += len(own) if isinstance(own, dict) else 0
            unseen.extend(value.values())
        elif isinstance(value, list):
            unseen.extend(value)
    if properties > MOST_PROPERTIES:
        raise BadRequest(f"the schema has {properties} properties, {MOST_PROPERTIES} are the most")


def _choices(text: str) -> list[str]:
    try:
        choices = msgspec.json.decode(text, type=list[str])
    except msgspec.DecodeError as error:
        raise BadRequest(f"choices must be an array of strings: {error}") from None
    if not choices or not all(choices):
        raise BadRequest("give at least one choice, and no empty one")
    return choices


def _literally(text: str) -> str:
    """An expression that matches this text only."""
    return re.sub(r"[^\w]", lambda found: rf"\x{{{ord(found[0]):x}}}", text)


def _lark(grammar: str) -> str:
    """Lark as it is, GBNF (`root ::= ...`) translated."""
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(grammar)
    except RecursionError:
        raise BadRequest("the grammar is nested too deep") from None
    except Exception as error:  # the library raises nothing narrower
        raise BadRequest(f"the grammar cannot be read: {error}") from None


def _refuse_special_tokens(guide: Guide) -> None:
    """A grammar can name tokens that are no text, such as `<|end|>`, which only one model has."""
    if guide.kind != "grammar":
        return
    from llguidance import LLMatcher

    _, warnings = LLMatcher.validate_grammar_with_warnings(_grammar_of(guide), limits=_limits(True))
    if any("special_token" in warning for warning in warnings):
        raise BadRequest("the grammar names special tokens; a guide is about text")
