"""app.chat.schema: the fields of a chat completion, their bounds, and the job that they become."""

from typing import Any

import pytest

from app.chat.messages import MAX_DEPTH, MAX_PARTS, MAX_TOOL_CALLS
from app.chat.sampling import MAX_LOGIT_BIAS, MAX_N, MAX_STOP_SEQUENCES
from app.chat.schema import MAX_MESSAGES, ChatCompletionRequest
from app.chat.tools import MAX_TOOLS
from app.http.validation import parse
from catalogue import ChatModelEntry
from protocol.errors import InvalidRequest, UnsupportedParameter
from protocol.jobs import ChatJob, SamplingParams

USER = {"role": "user", "content": "hi"}


def entry(**defaults: object) -> ChatModelEntry:
    return ChatModelEntry.model_validate(
        {"name": "chat", "tasks": ["chat"], "weights": "w", "defaults": defaults}
    )


def job(defaults: dict[str, Any] | None = None, **body: Any) -> ChatJob:
    request = parse(ChatCompletionRequest, {"model": "chat", "messages": [USER], **body})
    return request.to_job("id", entry(**defaults or {}))


def sampling(defaults: dict[str, Any] | None = None, **body: Any) -> SamplingParams:
    return job(defaults, **body).sampling


def refusal(**body: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        job(**body)
    return caught.value


# where a value comes from


def test_a_bare_request_leaves_everything_to_the_model_and_to_neutral_values():
    assert sampling() == SamplingParams(max_tokens=2048)
    assert job() == ChatJob(id="id", model="chat", messages=[USER], sampling=SamplingParams())


DEFAULTED: dict[str, tuple[Any, Any]] = {
    "temperature": (0.5, 0.0),
    "top_p": (0.5, 0.9),
    "top_k": (7, 3),
    "min_p": (0.5, 0.0),
    "repetition_penalty": (1.5, 1.0),
    "presence_penalty": (0.5, 0.0),
    "frequency_penalty": (0.5, 0.0),
    "max_tokens": (100, 5),
}
"""Field: a default of the catalogue, and a value of a request."""


@pytest.mark.parametrize("name", DEFAULTED)
def test_a_value_of_the_request_wins_over_the_default_of_the_catalogue(name):
    default, given = DEFAULTED[name]
    assert getattr(sampling({name: default}), name) == default
    assert getattr(sampling({name: default}, **{name: None}), name) == default
    assert getattr(sampling({name: default}, **{name: given}), name) == given


def test_zero_is_a_value_and_not_an_absent_field():
    assert sampling({"temperature": 1.0}, temperature=0).temperature == 0
    assert refusal(max_tokens=0).param == "max_tokens"


def test_max_completion_tokens_wins_over_max_tokens():
    assert sampling({"max_tokens": 100}, max_tokens=5, max_completion_tokens=7).max_tokens == 7
    assert sampling({"max_tokens": 100}, max_completion_tokens=7).max_tokens == 7


def test_template_arguments_are_merged_over_those_of_the_catalogue():
    defaults = {"chat_template_kwargs": {"thinking": True, "tone": "dry"}}
    made = job(defaults, chat_template_kwargs={"thinking": False})
    assert made.chat_template_kwargs == {"thinking": False, "tone": "dry"}
    assert job(defaults).chat_template_kwargs == {"thinking": True, "tone": "dry"}


def test_every_sampling_field_reaches_the_job():
    given = sampling(
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_p=0.5,
        top_k=4,
        min_p=0.5,
        seed=-1,
        n=2,
        stop=["a", "b"],
        stop_token_ids=[1, 2],
        ignore_eos=True,
        presence_penalty=-1,
        frequency_penalty=1,
        repetition_penalty=1.5,
        logit_bias={"5": -100, "6": 2.5},
        logprobs=True,
        top_logprobs=3,
    )
    assert given == SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_p=0.5,
        top_k=4,
        min_p=0.5,
        seed=-1,
        n=2,
        stop=("a", "b"),
        stop_token_ids=(1, 2),
        ignore_eos=True,
        presence_penalty=-1,
        frequency_penalty=1,
        repetition_penalty=1.5,
        logit_bias={5: -100, 6: 2.5},
        logprobs=3,
    )


def test_top_k_minus_one_and_zero_both_mean_no_limit():
    assert sampling({"top_k": 7}, top_k=-1).top_k == 0
    assert sampling({"top_k": 7}, top_k=0).top_k == 0


def test_one_stop_string_is_a_list_of_one():
    assert sampling(stop="END").stop == ("END",)


def test_logprobs_without_alternatives_report_the_chosen_token_only():
    assert sampling(logprobs=True).logprobs == 0
    assert sampling(logprobs=False).logprobs is None


# bounds


@pytest.mark.parametrize(
    ("name", "valid", "invalid"),
    [
        ("temperature", [0, 2.0], [-0.1, 2.1, True, "1", float("nan"), float("inf")]),
        ("top_p", [0, 0.001, 1], [-0.001, 1.001]),
        ("top_k", [-1, 1_000_000], [-2, 1_000_001, 1.0]),
        ("min_p", [0, 1], [-0.1, 1.1]),
        ("seed", [-(2**63), 2**63 - 1], [-(2**63) - 1, 2**63, 1.0, "1"]),
        ("n", [1, MAX_N], [0, MAX_N + 1, True]),
        ("max_tokens", [1, 2**31], [0, -1, 2**31 + 1]),
        ("max_completion_tokens", [1, 2**31], [0, 2**31 + 1]),
        ("min_tokens", [0, 2048], [-1, 2**31 + 1]),
        ("stop", ["x" * 1024, ["x"] * MAX_STOP_SEQUENCES, []], ["", "x" * 1025, [""], ["x"] * 17, 5]),
        ("stop_token_ids", [[0, 2**31 - 1], [1] * 1024], [[-1], [2**31], [1] * 1025, ["1"]]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
        ("repetition_penalty", [0.001, 2], [0, 2.1]),
        ("logit_bias", [{}, {"1": 100}, {"1": -100}], [{"1": 100.1}, {"1": -101}, {"1": None}, []]),
        ("logprobs", [True, False], [1, "true"]),
        ("stream", [True, False], [1, "true"]),
        ("stream_options", [None], [[], {"include_usage": 1}]),
        ("chat_template_kwargs", [{"a": [1]}], ["a", []]),
    ],
)
def test_bounds(name, valid, invalid):
    for value in [None, *valid]:
        job(**{name: value})
    for value in invalid:
        found = refusal(**{name: value})
        assert (found.param or "").split(".")[0] == name, (value, found.message)


def test_the_number_of_biases_is_bounded_before_each_is_validated():
    job(logit_bias={str(token): 1 for token in range(MAX_LOGIT_BIAS)})
    found = refusal(logit_bias={str(token): "wrong" for token in range(MAX_LOGIT_BIAS + 1)})
    assert found.message == f"logit_bias must have at most {MAX_LOGIT_BIAS} items"


@pytest.mark.parametrize("token", ["", "-1", "1.0", "a", "٣", "²", "1234567890"])
def test_keys_of_logit_bias_are_token_ids(token):
    found = refusal(logit_bias={"1": 1, token: 1})
    assert found.param == "logit_bias" and "token id" in found.message


def test_min_tokens_is_at_most_max_tokens_wherever_that_comes_from():
    assert sampling(min_tokens=5, max_tokens=5).min_tokens == 5
    assert refusal(min_tokens=6, max_tokens=5).param == "min_tokens"
    with pytest.raises(InvalidRequest, match=r"min_tokens must be at most max_tokens \(5\); it is 6"):
        job({"max_tokens": 5}, min_tokens=6)


def test_top_logprobs_requires_logprobs():
    assert refusal(top_logprobs=3).param == "top_logprobs"
    assert refusal(top_logprobs=3, logprobs=False).param == "top_logprobs"
    assert refusal(top_logprobs=21, logprobs=True).param == "top_logprobs"


def test_unknown_fields_are_ignored():
    assert job(wallet="w", messages=[{**USER, "mood": "good"}]) == job()


# messages


def messages(*given: dict[str, Any], **body: Any) -> list[dict[str, Any]]:
    return job(messages=list(given), **body).messages


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert messages({"role": "user", "content": parts}) == [{"role": "user", "content": "one two"}]
    assert messages({"role": "user", "content": []}) == [{"role": "user", "content": ""}]


IMAGE = {"type": "image_url", "image_url": {"url": "https://h/a.png", "detail": "low"}}


def test_a_message_with_images_is_a_list_of_parts():
    text = {"type": "text", "text": "one"}
    content = [text, IMAGE, text, {**IMAGE, "image_url": "data:x"}]
    given = {"model": "chat", "messages": [USER, {"role": "user", "content": content}]}
    body = parse(ChatCompletionRequest, given)
    assert body.images() == [
        ("https://h/a.png", "low", "messages.1.content.1"),
        ("data:x", "auto", "messages.1.content.3"),
    ]
    image = {"type": "image"}
    made = body.to_job("id", entry())
    assert made.messages == [USER, {"role": "user", "content": [text, image, text, image]}]
    assert made.images == []


@pytest.mark.parametrize("role", ["system", "developer", "assistant", "function"])
def test_images_belong_into_messages_of_users_and_tools(role):
    assert messages({"role": "tool", "content": [IMAGE]})[0]["content"] == [{"type": "image"}]
    assert refusal(messages=[{"role": role, "content": [IMAGE]}]).param == "messages.0.content.0"


@pytest.mark.parametrize("detail", ["", "auto ", 1])
def test_an_unknown_detail_is_refused(detail):
    part = {"type": "image_url", "image_url": {"url": "data:x", "detail": detail}}
    assert "messages.0" in (refusal(messages=[{"role": "user", "content": [part]}]).param or "")


@pytest.mark.parametrize("part", [{"type": "image_url"}, {"type": "input_audio"}, {"type": "text"}])
def test_other_parts_are_refused_with_their_place(part):
    content = [{"type": "text", "text": "one"}, part]
    with pytest.raises(UnsupportedParameter) as caught:
        messages(USER, {"role": "user", "content": content})
    assert caught.value.param == "messages.1.content.1"
    assert repr(part["type"]) in caught.value.message


def test_the_developer_role_is_the_system_role_of_templates():
    assert messages({"role": "developer", "content": "be brief"}, USER)[0]["role"] == "system"


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool", "function"])
def test_other_roles_and_names_are_kept(role):
    given = {"role": role, "content": "hi", "name": "Ann"}
    assert messages(given) == [given]


def test_only_an_assistant_may_have_no_content():
    assert messages({"role": "assistant"}) == [{"role": "assistant", "content": ""}]
    assert refusal(messages=[USER, {"role": "user"}]).param == "messages.1"
    assert refusal(messages=[{"role": "system", "content": None}]).param == "messages.0"


@pytest.mark.parametrize("given", [[], [USER] * (MAX_MESSAGES + 1), "hi", [{"role": "robot", "content": ""}]])
def test_messages_are_bounded(given):
    assert (refusal(messages=given).param or "").startswith("messages")


def test_parts_are_bounded():
    part = {"type": "text", "text": "x"}
    assert messages({"role": "user", "content": [part] * MAX_PARTS})[0]["content"] == "x" * MAX_PARTS
    assert refusal(messages=[{"role": "user", "content": [part] * (MAX_PARTS + 1)}]).param is not None


def test_a_final_message_is_continued_only_if_it_is_an_assistants():
    answer = {"role": "assistant", "content": "Once upon"}
    assert job(messages=[USER, answer], continue_final_message=True).continue_final_message
    assert not job(messages=[USER, answer]).continue_final_message
    assert refusal(messages=[answer, USER], continue_final_message=True).param == "continue_final_message"


# calls, results and reasoning of earlier answers


def tool_call(arguments: str = '{"city": "Rome"}', **fields: Any) -> dict[str, Any]:
    return {
        "id": "call00001",
        "type": "function",
        "function": {"name": "get_weather", "arguments": arguments, **fields},
    }


def assistant(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", **fields}


def test_calls_and_their_results_reach_the_template_with_arguments_as_an_object():
    result = {"role": "tool", "tool_call_id": "call00001", "content": "sunny", "name": "get_weather"}
    made = messages(USER, assistant(content=None, tool_calls=[tool_call()]), result)
    call = {"name": "get_weather", "arguments": {"city": "Rome"}}
    assert made[1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call00001", "type": "function", "function": call}],
        },
        result,
    ]


@pytest.mark.parametrize("text", ["", " "])
def test_a_call_without_arguments_has_an_empty_object(text):
    (made,) = messages(assistant(tool_calls=[tool_call(text)]))
    assert made["tool_calls"][0]["function"]["arguments"] == {}


def test_text_beside_calls_is_kept():
    (made,) = messages(assistant(content="Let me look.", tool_calls=[tool_call()]))
    assert made["content"] == "Let me look." and len(made["tool_calls"]) == 1


@pytest.mark.parametrize("text", ["{", "[]", "1", "null", '{"a": }', "[" * 10_000, "{'a': 1}", '{"a": NaN}'])
def test_arguments_that_are_no_object_are_refused_with_their_place(text):
    found = refusal(messages=[USER, assistant(tool_calls=[tool_call("{}"), tool_call(text)])])
    assert found.param == "messages.1.tool_calls.1.function.arguments"
    assert "must be a JSON object" in found.message


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"id": ""}, "id"),
        ({"id": "x" * 257}, "id"),
        ({"id": 1}, "id"),
        ({"type": "custom"}, "type"),
        ({"function": None}, "function"),
        ({"function": {"arguments": "{}"}}, "function.name"),
        ({"function": {"name": "", "arguments": "{}"}}, "function.name"),
        ({"function": {"name": "a b", "arguments": "{}"}}, "function.name"),
        ({"function": {"name": "x" * 129, "arguments": "{}"}}, "function.name"),
        ({"function": {"name": "f"}}, "function.arguments"),
        ({"function": {"name": "f", "arguments": {}}}, "function.arguments"),
    ],
)
def test_a_call_is_validated_with_its_place(changed, param):
    found = refusal(messages=[assistant(tool_calls=[{**tool_call(), **changed}])])
    assert found.param == f"messages.0.tool_calls.0.{param}", found.message


def test_the_number_of_calls_is_bounded():
    messages(assistant(tool_calls=[tool_call()] * MAX_TOOL_CALLS))
    found = refusal(messages=[assistant(tool_calls=[tool_call()] * (MAX_TOOL_CALLS + 1))])
    assert found.param == "messages.0.tool_calls"


@pytest.mark.parametrize(
    ("role", "field", "value"),
    [
        ("user", "tool_calls", [tool_call()]),
        ("tool", "tool_calls", [tool_call()]),
        ("user", "tool_call_id", "call00001"),
        ("assistant", "tool_call_id", "call00001"),
        ("system", "refusal", "no"),
        ("user", "reasoning_content", "hm"),
        ("tool", "reasoning", "hm"),
    ],
)
def test_a_field_of_another_role_is_refused(role, field, value):
    found = refusal(messages=[USER, {"role": role, "content": "hi", field: value}])
    assert found.param == f"messages.1.{field}"
    assert messages({"role": role, "content": "hi", field: None}) == [{"role": role, "content": "hi"}]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_of_an_earlier_answer_has_one_name_for_templates(field):
    (made,) = messages(assistant(content="4", **{field: "2 + 2"}))
    assert made == {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}


def test_a_refusal_is_the_text_of_its_message():
    assert messages(assistant(content=None, refusal="I can't."))[0]["content"] == "I can't."
    parts = [{"type": "text", "text": "Sorry. "}, {"type": "refusal", "refusal": "I can't."}]
    assert messages(assistant(content=parts))[0]["content"] == "Sorry. I can't."
    assert messages(assistant(content="Done.", refusal=None))[0] == assistant(content="Done.")


# fields that are not supported


@pytest.mark.parametrize(
    ("name", "neutral", "value"),
    [
        ("functions", [[]], [{"name": "f"}]),
        ("function_call", ["none", "auto"], {"name": "f"}),
        ("audio", [], {"voice": "alloy"}),
        ("modalities", [["text"]], ["text", "audio"]),
        ("prediction", [], {"type": "content"}),
        ("web_search_options", [], {}),
    ],
)
def test_an_unsupported_field_is_refused_unless_it_requests_nothing(name, neutral, value):
    for harmless in [None, *neutral]:
        assert job(**{name: harmless}) == job()
    found = refusal(**{name: value})
    assert isinstance(found, UnsupportedParameter) and found.param == name
    assert found.message == f"{name} is not supported by model 'chat'; leave it out"


# tools


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get_weather", **fields}}


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "additionalProperties": False}


def test_tools_reach_the_worker_as_templates_expect_them():
    given = function(description="Looks out of the window.", parameters=SCHEMA, strict=False)
    assert job(tools=[given, {**function(), "x": 1}]).tools == [
        function(description="Looks out of the window.", parameters=SCHEMA),
        function(parameters={"type": "object", "properties": {}}),
    ]


@pytest.mark.parametrize(("choice", "count"), [(None, 1), ("auto", 1), ("none", 0)])
def test_without_a_choice_the_model_gets_no_tools(choice, count):
    assert len(job(tools=[function()], tool_choice=choice).tools) == count
    assert job(tool_choice=choice).tools == [] == job(tools=[]).tools


def test_parallel_calls_are_allowed_unless_the_request_forbids_them():
    assert job().parallel_tool_calls and job(parallel_tool_calls=True).parallel_tool_calls
    assert not job(parallel_tool_calls=False).parallel_tool_calls


NAMED = {"type": "function", "function": {"name": "get_weather"}}
OTHER = {"type": "function", "function": {"name": "now", "strict": True}}


def test_required_calls_are_those_of_all_tools_or_of_the_named_one():
    both = job(tools=[function(), OTHER], tool_choice="required")
    assert both.required_tools == ["get_weather", "now"] and both.parallel_tool_calls
    one = job(tools=[function(), OTHER], tool_choice=NAMED)
    assert one.required_tools == ["get_weather"] and len(one.tools) == 2
    # a named function is called once
    assert not one.parallel_tool_calls
    assert not job(tools=[function()], tool_choice="required", parallel_tool_calls=False).parallel_tool_calls
    assert job(tools=[function()]).required_tools == []


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        (None, "required", "tool_choice"),
        ([], "required", "tool_choice"),
        ([], NAMED, "tool_choice.function.name"),
        ([OTHER], NAMED, "tool_choice.function.name"),
        ([OTHER], {"type": "function"}, "tool_choice.function"),
        ([OTHER], {"type": "custom", "function": {"name": "now"}}, "tool_choice.type"),
    ],
)
def test_a_call_of_no_tool_cannot_be_required(tools, choice, param):
    assert refusal(tools=tools, tool_choice=choice).param == param


def test_strict_tools_reach_the_worker_by_name():
    made = job(tools=[function(), OTHER])
    assert made.strict_tools == ["now"] and "strict" not in made.tools[1]["function"]
    assert job(tools=[OTHER], tool_choice="none").strict_tools == []


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"items": value}
    return value


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{"type": "function"}], "tools.0.function"),
        ([{"type": "custom", "custom": {"name": "f"}}], "tools.0.type"),
        ([{"type": "custom", "function": {"name": "f"}}], "tools.0.type"),
        ([{"function": {"name": "f"}}], "tools.0.type"),
        ([function(name="")], "tools.0.function.name"),
        ([function(name="a b")], "tools.0.function.name"),
        ([function(name="a\n")], "tools.0.function.name"),
        ([function(parameters=[])], "tools.0.function.parameters"),
        ([function(parameters=nested(MAX_DEPTH))], "tools.0.function.parameters"),
        ([function(description=1)], "tools.0.function.description"),
        ([function()] * (MAX_TOOLS + 1), "tools"),
        ({"name": "f"}, "tools"),
        ("f", "tools"),
    ],
)
def test_tools_are_validated_with_their_place(tools, param):
    assert refusal(tools=tools).param == param


def test_tools_up_to_the_bounds_are_accepted():
    job(tools=[function()] * MAX_TOOLS)
    job(tools=[function(parameters=nested(MAX_DEPTH - 1), name="x" * 128)])
    assert refusal(tool_choice="sometimes").param == "tool_choice"
    assert refusal(parallel_tool_calls=1).param == "parallel_tool_calls"


def test_stream_options_need_a_stream() -> None:
    job(stream=True, stream_options={"include_usage": True})
    with pytest.raises(InvalidRequest) as error:
        job(stream_options={"include_usage": True})
    assert error.value.param == "stream_options"


def test_a_top_p_of_0_is_greedy() -> None:
    sampling = job(top_p=0, temperature=1.5).sampling
    assert sampling.temperature == 0 and sampling.top_p is None


def test_reasoning_effort_is_one_of_the_known_words():
    for effort in (None, "none", "minimal", "low", "medium", "high", "xhigh", "max"):
        assert job(reasoning_effort=effort).reasoning_effort == effort
    assert refusal(reasoning_effort="some").param == "reasoning_effort"
