"""What a client asks: what is understood, and what is refused and how."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import BadRequest, PromptTooLong, RequestError, Unsupported
from penstock.request import Guide, Sampling
from penstock.serve.asks import Ask, output_budget, parse_chat, parse_completion
from penstock.serve.chat_template import Chat
from penstock.serve.openai import error_body


def chat(**fields: object) -> Ask:
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]} | fields
    return parse_chat(json.dumps(body).encode())


def completion(**fields: object) -> Ask:
    return parse_completion(json.dumps({"model": "demo", "prompt": "hi"} | fields).encode())


def test_a_short_chat_gets_openais_defaults() -> None:
    assert chat() == Ask(model="demo", chat=Chat([{"role": "user", "content": "hi"}]))


def test_every_supported_field_arrives() -> None:
    ask = chat(
        max_completion_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=3,
        seed=-1,
        stop=["a", "b"],
        stop_token_ids=[4],
        include_stop_str_in_output=True,
        ignore_eos=True,
        min_p=0.1,
        min_tokens=2,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": -1},
        bad_words=["damn"],
        n=2,
        skip_special_tokens=False,
        truncate_prompt_tokens=9,
        return_token_ids=True,
        return_tokens_as_token_ids=True,
        priority=-1,
        prompt_cache_key="me",
        cache_salt="s",
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
        user="me",
        penstock={"timeline": True},
    )
    assert ask == Ask(
        model="demo",
        chat=Chat([{"role": "user", "content": "hi"}]),
        max_tokens=7,
        given={
            **{"temperature": 0.0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5},
            **{"presence_penalty": 0.5, "frequency_penalty": -0.5, "min_tokens": 2, "ignore_eos": True},
            **{"stop_token_ids": (4,), "logit_bias": ((5, -1.0),), "logprobs": 2},
        },
        seed=(1 << 63) - 1,
        bad_words=("damn",),
        n=2,
        best_of=2,
        stop=("a", "b"),
        includes_stop=True,
        shows_special=True,
        takes_last_tokens=9,
        shows_token_ids=True,
        names_tokens_by_id=True,
        is_stream=True,
        wants_usage=True,
        wants_timeline=True,
        priority=-1,
        session="me",
        salt="s",
        needs=(
            *(("sampling", "top_p"), ("sampling", "top_k"), ("sampling", "min_p")),
            *(("penalties", "repetition_penalty"), ("penalties", "presence_penalty")),
            *(("penalties", "frequency_penalty"), ("penalties", "logit_bias"), ("penalties", "bad_words")),
            ("logprobs", "logprobs"),
        ),
    )


def test_what_a_client_says_goes_before_what_the_model_says() -> None:
    ask = chat(top_p=0.5, stop_token_ids=[4])
    sampling = ask.sampling({"temperature": 0.7, "top_p": 0.9}, max_tokens=3, seed=1)
    assert sampling == Sampling(3, temperature=0.7, top_p=0.5, stop_token_ids=(4,), seed=1)


def test_null_means_not_given() -> None:
    names = ["max_tokens", "temperature", "top_p", "seed", "stop", "logprobs", "stream", "stream_options", "tools"]
    assert chat(**dict.fromkeys(names)) == chat()


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "echo": False, "best_of": 1, "top_logprobs": 0},
        {"logit_bias": {}, "tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}, "guided_json": None},
        {"parallel_tool_calls": True, "service_tier": "auto", "store": False, "metadata": {}},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(fields: dict[str, object]) -> None:
    assert chat(**fields) == chat()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 3),
        ("echo", True),
        ("suffix", "x"),
        ("use_beam_search", True),
        ("functions", [{}]),
        ("modalities", ["text", "audio"]),
        ("metadata", {"a": "b"}),
        ("store", True),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(Unsupported, match=f"^{name} = .* is not supported") as caught:
        chat(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"seed": 1 << 63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 513}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": True}}, "stream_options.x"),
        ({"penstock": {"timelin": True}}, "penstock.timelin"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "hi"}] * 4097}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 3000}] * 2}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}] * 5000}]}, "messages"),
        ({"documents": [{}] * 4097}, "documents"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "x" * (1 << 19)}}]}, "tools"),
        ({"bad_words": ["x" * 500] * 20}, "bad_words"),
        ({"user": "," * ((1 << 20) + 1)}, None),
        ({"user": "[" * (1 << 17)}, None),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning_effort": "lots"}, "reasoning_effort"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "hi", "tone": "warm"}]}, "messages[0].tone"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"text": "hi"}]}]}, "messages[0].content[0].type"),
    ],
)
def test_mistakes_are_named(fields: dict[str, object], param: str | None) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert param is None or param in str(caught.value)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "function", "content": "4"}, "messages[0].role"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0].type"),
    ],
)
def test_messages_that_need_more_than_text_are_refused(message: dict[str, object], param: str) -> None:
    with pytest.raises(Unsupported) as caught:
        chat(messages=[message])
    assert caught.value.param == param


def test_messages_become_what_templates_know() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answered = {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": None, "annotations": []}
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": "Ann"},
        answered,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "4", "tool_call_id": "a"},
    ]
    parsed = chat(messages=messages).chat
    assert parsed is not None
    assert parsed.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one\ntwo", "name": "Ann"},
        {"role": "assistant", "content": "ok"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "4", "tool_call_id": "a"},
    ]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def test_guides() -> None:
    ask = chat(response_format={"type": "json_object"})
    assert (ask.given["guide"], ask.needs) == (Guide("json_object"), (("guide", "response_format"),))
    assert completion(guided_regex="a+").given["guide"] == Guide("regex", "a+")
    for fields in ({"guided_regex": "("}, {"guided_regex": "a", "guided_choice": ["a"]}):
        with pytest.raises(BadRequest, match="guided"):
            completion(**fields)


def test_a_call_that_is_forced_is_guided() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        ask = chat(tools=[TOOL], tool_choice=choice)
        assert ask.needs == (("guide", "tool_choice"),)
        assert isinstance(ask.given["guide"], Guide) and ask.given["guide"].kind == "json_schema"
        with pytest.raises(BadRequest, match="leave one out"):
            chat(tools=[TOOL], tool_choice=choice, guided_regex="a")


def test_what_templates_are_told() -> None:
    said = {"chat_template_kwargs": {"enable_thinking": False}, "documents": [{"text": "a"}], "reasoning_effort": "low"}
    ask = chat(tools=[TOOL], continue_final_message=True, include_reasoning=False, **said)
    assert ask.chat == Chat(
        [{"role": "user", "content": "hi"}],
        tools=[{"type": "function", "function": TOOL["function"] | {"description": ""}}],
        documents=[{"text": "a"}],
        continue_final_message=True,
        template_kwargs={"enable_thinking": False, "reasoning_effort": "low"},
    )
    assert (ask.tools.choice.mode, ask.tools.callable_names, ask.shows_reasoning) == ("auto", ("f",), False)
    ask = chat(tools=[TOOL], tool_choice="none")
    assert ask.chat is not None and ask.chat.tools == () and ask.tools.callable_names == ()


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", ("hi",)),
        (["hi"], ("hi",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ([1, 2],)),
        ([[1, 2]], ([1, 2],)),
        ([[1], [2]], ([1], [2])),
    ],
)
def test_prompts(prompt: object, prompts: tuple[object, ...]) -> None:
    ask = completion(prompt=prompt, logprobs=0)
    assert (ask.prompts, ask.logprobs) == (prompts, 0)


def test_the_fields_of_plain_completions() -> None:
    ask = completion(echo=True, logprobs=3, best_of=4, n=2, max_tokens=0, add_special_tokens=False)
    assert (ask.echoes, ask.best_of, ask.n, ask.max_tokens, ask.adds_special) == (True, 4, 2, 0, False)
    assert ask.given == {"logprobs": 3, "prompt_logprobs": 3}
    assert ask.needs == (("logprobs", "logprobs"), ("prompt_logprobs", "echo"), ("logprobs", "best_of"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": [[1]] * 129}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": [[1], []]}, "prompt[1]"),
    ],
)
def test_mistakes_in_plain_completions_are_named(fields: dict[str, object], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        completion(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize("prompt", ["", [], None, 1, [True], [1, "a"], [-1], [1.5], [[1, -1]], [[[1]]]])
def test_prompts_that_are_none(prompt: object) -> None:
    with pytest.raises(BadRequest) as caught:
        completion(prompt=prompt)
    assert caught.value.param is not None
    assert caught.value.param.startswith("prompt")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"model":"\xff"}',
        b'{"model":"\\ud800"}',
        b'{"model":"a","temperature":NaN}',
        b'{"model":"a","temperature":1e999}',
        b'{"model":"a","seed":' + b"1" * 5000 + b"}",
        b'{"model":"a","messages":' + b"[" * 100_000,
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    for parse in (parse_chat, parse_completion):
        with pytest.raises(BadRequest, match=r"^the body "):
            parse(body)


FIELDS = [
    *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed"),
    *("stop", "stop_token_ids", "ignore_eos", "logprobs", "top_logprobs", "stream", "stream_options", "penstock"),
    *("user", "n", "echo", "tools", "response_format"),
]
INNER = ["role", "content", "name", "type", "text", "include_usage", "timeline", "tool_calls"]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars | st.sampled_from(["user", "text", "demo"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER), inner, max_size=3),
    max_leaves=8,
)
SOUND = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}


@given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=4), st.booleans())
def test_any_body_is_understood_or_refused(fields: dict[str, object], is_nearly_sound: bool) -> None:
    body = json.dumps(SOUND | fields if is_nearly_sound else fields).encode()
    for parse in (parse_chat, parse_completion):
        try:
            assert isinstance(parse(body), Ask)
        except RequestError as error:
            assert error.status == 400
            json.loads(error_body(error))


@given(st.binary(max_size=30))
def test_any_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_chat(body)


# Budgets


def test_the_budget() -> None:
    assert output_budget(10, 5, None, 100) == 5
    assert output_budget(10, 90, None, 100) == 90
    assert output_budget(10, None, None, 100) == 90
    assert output_budget(10, None, 16, 100) == 16
    assert output_budget(90, None, 16, 100) == 10


@pytest.mark.parametrize(("prompt", "asked"), [(100, None), (500, 1), (10, 91)])
def test_what_does_not_fit_is_told_the_numbers(prompt: int, asked: int | None) -> None:
    with pytest.raises(PromptTooLong, match=f"has {prompt} tokens.*(99|100)") as caught:
        output_budget(prompt, asked, None, 100)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == ("max_tokens" if prompt < 100 else "prompt")
