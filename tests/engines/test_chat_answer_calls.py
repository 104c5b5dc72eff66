"""Calls of tools: the format of a chat template, and answers divided by it wherever their text is cut."""

import json
import re
from typing import Any, get_args

import pytest

from catalogue.options import ToolFormat
from protocol.errors import UnsupportedParameter
from protocol.jobs import ChatJob, SamplingParams
from tests.engines import chat_templates as templates
from tests.engines.test_chat_answer_thinking import tokenizer
from workers.engines.chat.answer.call_format import CallFormat, MarkedSyntax, ObjectSyntax, derive
from workers.engines.chat.answer.calls import DIFFERENT, MORE, CallDivider, match
from workers.engines.chat.answer.families import FAMILIES, JSON_FORMATS, family_of
from workers.engines.chat.answer.format import AnswerFormat
from workers.engines.chat.answer.json_text import parse_object, write_json
from workers.engines.chat.answer.parser import AnswerParser
from workers.engines.chat.answer.pieces import CallArguments, CallStart, Content, Piece, Reasoning
from workers.engines.chat.answer.probe import TemplateProbe
from workers.engines.chat.answer.thinking import ThinkTags

QUESTION = {"role": "user", "content": "question"}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


TOOLS = [
    tool("weather", city={"type": "string"}, days={"type": "integer"}, tags={"type": "array"}),
    tool("now"),
]
WEATHER = {"city": "Rome", "days": 3, "tags": ["a}", "é\n"]}


def job(**fields: Any) -> ChatJob:
    sampling = SamplingParams(stop=fields.pop("stop", ()))
    return ChatJob(
        **{"id": "r", "model": "tiny", "messages": [QUESTION], "tools": TOOLS, **fields}, sampling=sampling
    )


class Answer:
    """What the pieces of an answer amount to."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        self.reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        self.calls: list[tuple[str, str]] = []
        self.ids: list[str] = []
        for piece in pieces:
            if isinstance(piece, CallStart):
                assert piece.number == len(self.calls)
                self.calls.append((piece.name, ""))
                self.ids.append(piece.id)
            elif isinstance(piece, CallArguments):
                name, text = self.calls[piece.number]
                self.calls[piece.number] = name, text + piece.text

    @property
    def parsed(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(text)) for name, text in self.calls]


def feed(answer: AnswerParser, parts: list[str], cut: bool = False) -> Answer:
    pieces = [piece for part in parts for piece in answer.feed(part)[0]]
    return Answer(pieces + answer.finish("", cut)[0])


def parse(template: str, parts: list[str], prompt: str = "", cut: bool = False, **fields: Any) -> Answer:
    parser = AnswerFormat(tokenizer(template)).parser(job(**fields), prompt)
    assert parser is not None
    return feed(parser, parts, cut)


# the formats of templates


def derived(template: str) -> CallFormat | None:
    probe = TemplateProbe(tokenizer(template))
    return derive(probe, ThinkTags.of(probe))


HERMES = CallFormat(
    "<tool_call>\n",
    ObjectSyntax("name", "arguments"),
    "\n</tool_call>",
    "\n</tool_call>\n<tool_call>\n",
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (templates.HERMES, HERMES),
        (templates.QWEN3, HERMES),
        (templates.QWEN3_THINKING, HERMES),
        (templates.LLAMA_3_1, CallFormat("", ObjectSyntax("name", "parameters"), "")),
        (
            templates.MISTRAL_NEMO,
            CallFormat("[TOOL_CALLS][", ObjectSyntax("name", "arguments", "id"), "]", ", "),
        ),
        (
            templates.MISTRAL_SMALL,
            CallFormat("[TOOL_CALLS]", MarkedSyntax("[ARGS]", "[CALL_ID]"), "", "[TOOL_CALLS]"),
        ),
        (
            templates.DEEPSEEK_R1,
            CallFormat(
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>",
                MarkedSyntax("\n```json\n"),
                "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                "\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
                text_arguments=True,
            ),
        ),
        (
            templates.DEEPSEEK_V3_1,
            CallFormat(
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
                MarkedSyntax("<｜tool▁sep｜>"),
                "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                "<｜tool▁call▁end｜><｜tool▁call▁begin｜>",
            ),
        ),
        (
            templates.KIMI_K2,
            CallFormat(
                "<|tool_calls_section_begin|><|tool_call_begin|>functions.",
                MarkedSyntax("<|tool_call_argument_begin|>", None, True, "functions."),
                "<|tool_call_end|><|tool_calls_section_end|>",
                "<|tool_call_end|><|tool_call_begin|>functions.",
            ),
        ),
        (
            templates.COMMAND_R7B,
            CallFormat(
                "<|START_ACTION|>[\n    ",
                ObjectSyntax("tool_name", "parameters"),
                "\n]<|END_ACTION|><|END_OF_TURN_TOKEN|>",
                ",\n    ",
            ),
        ),
        (templates.GLM_4_5, None),
        (templates.QWEN3_CODER, None),
        (templates.MINIMAX_M2, None),
        (templates.GEMMA_3, None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ raise_exception('no') if tools }}", None),
    ],
)
def test_the_format_is_that_of_the_template(template, expected):
    assert derived(template) == expected


@pytest.mark.parametrize(
    ("template", "family"),
    [
        (templates.GPT_OSS, "harmony"),
        (templates.GEMMA_4, "gemma4"),
        (templates.QWEN3_CODER, "qwen3_coder"),
        (templates.GLM_4_5, "glm"),
        (templates.MINIMAX_M2, "invoke"),
        (templates.MINIMAX_M2.replace("minimax:tool_call", "｜DSML｜tool_calls").replace("<invoke", "<｜DSML｜invoke").replace("<parameter", "<｜DSML｜parameter"), "invoke"),
        (templates.QWEN3, None),
    ],
)  # fmt: skip
def test_calls_that_are_not_json_show_their_family(template, family):
    from workers.engines.chat.answer.call_format import render_calls

    assert family_of(render_calls(TemplateProbe(tokenizer(template)), 1, as_text=False) or "") == family


def test_the_catalogue_knows_every_format():
    assert set(get_args(ToolFormat)) == {"none", *FAMILIES, *JSON_FORMATS}


@pytest.mark.parametrize("template", [templates.GEMMA_3, templates.DEEPSEEK_V3_1])
def test_a_model_whose_template_does_not_show_tools_refuses_them_by_name(template):
    made = AnswerFormat(tokenizer(template))
    made.check(job(tools=[]))
    with pytest.raises(UnsupportedParameter, match="tools are not supported by model 'tiny'") as caught:
        made.check(job())
    assert caught.value.param == "tools"


def test_the_catalogue_can_name_a_format_or_none():
    made = AnswerFormat(tokenizer(templates.GEMMA_3), "hermes")
    made.check(job())
    parser = made.parser(job(), "")
    assert parser is not None
    assert feed(parser, ['<tool_call>{"name": "now"}</tool_call>']).calls == [("now", "{}")]
    with pytest.raises(UnsupportedParameter):
        AnswerFormat(tokenizer(templates.HERMES), "none").check(job())
    AnswerFormat(tokenizer(templates.GEMMA_3), "glm").check(job())


# answers


def arguments(**changes: Any) -> str:
    return json.dumps({**WEATHER, **changes}, ensure_ascii=False)


W = json.dumps(WEATHER, ensure_ascii=False)
TAGS_JSON = json.dumps(WEATHER["tags"])

TWO_CALLS: dict[str, tuple[str, str]] = {
    "hermes": (
        templates.HERMES,
        f'<tool_call>\n{{"name": "weather", "arguments": {W}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    ),
    "hermes without spaces": (
        templates.HERMES,
        f'<tool_call>{{"arguments":{W},"name":"weather"}}</tool_call><tool_call>{{"name":"now"}}</tool_call>',
    ),
    "mistral nemo": (
        templates.MISTRAL_NEMO,
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {W}}}, {{"name": "now", "arguments": {{}}}}]',
    ),
    "mistral small": (
        templates.MISTRAL_SMALL,
        f"[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{W}[TOOL_CALLS]now[ARGS]{{}}",
    ),
    "deepseek r1": (
        templates.DEEPSEEK_R1,
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        f"{W}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{{}}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "deepseek v3.1": (
        templates.DEEPSEEK_V3_1,
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{W}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "kimi k2": (
        templates.KIMI_K2,
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{W}"
        "<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
    ),
    "command r7b": (
        templates.COMMAND_R7B,
        f'<|START_ACTION|>[\n    {{"tool_call_id": "0", "tool_name": "weather", "parameters": {W}}},\n'
        '    {"tool_call_id": "1", "tool_name": "now", "parameters": {}}\n]<|END_ACTION|>',
    ),
    "llama 3.1": (
        templates.LLAMA_3_1,
        f'{{"name": "weather", "parameters": {W}}}; {{"name": "now", "parameters": {{}}}}',
    ),
    "glm": (
        templates.GLM_4_5,
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n"
        f"<arg_value>3</arg_value>\n<arg_key>tags</arg_key>\n<arg_value>{TAGS_JSON}</arg_value>\n</tool_call>\n"
        "<tool_call>now\n</tool_call>",
    ),
    "qwen3 coder": (
        templates.QWEN3_CODER,
        "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        f"<parameter=tags>\n{TAGS_JSON}\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ),
    "minimax m2": (
        templates.MINIMAX_M2,
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Rome</parameter>\n'
        f'<parameter name="days">3</parameter>\n<parameter name="tags">{TAGS_JSON}</parameter>\n</invoke>\n'
        '<invoke name="now">\n</invoke>\n</minimax:tool_call>',
    ),
    "gemma 4": (
        templates.GEMMA_4,
        '<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:3,tags:[<|"|>a}<|"|>,<|"|>é\n<|"|>]}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|>",
    ),
    "gpt-oss": (
        templates.GPT_OSS,
        f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{W}<|call|>"
        "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}",
    ),
}


def few_cuts(text: str) -> list[list[str]]:
    """Return the text cut at every single place, and into parts of one to seven characters."""
    halves = [[text[:at], text[at:]] for at in range(len(text) + 1)]
    return halves + [[text[at : at + size] for at in range(0, len(text), size)] for size in range(1, 8)]


@pytest.mark.parametrize("name", TWO_CALLS)
def test_calls_are_read_wherever_the_answer_is_cut(name):
    template, text = TWO_CALLS[name]
    made = AnswerFormat(tokenizer(template))
    for parts in few_cuts(text):
        parser = made.parser(job(), "")
        assert parser is not None
        answer = feed(parser, parts)
        assert answer.parsed == [("weather", WEATHER), ("now", {})], parts
        assert answer.content == "" and answer.reasoning == "", parts
        assert parser.calls == 2
        assert len(set(answer.ids)) == 2 and all(re.fullmatch(r"[\w.:-]{9,}", id) for id in answer.ids)


@pytest.mark.parametrize("name", [name for name in TWO_CALLS if name not in ("llama 3.1", "gpt-oss")])
def test_text_beside_calls_is_content(name):
    template, text = TWO_CALLS[name]
    made = AnswerFormat(tokenizer(template))
    for parts in few_cuts(f"Let me < look.\n\n{text}\n"):
        parser = made.parser(job(), "")
        assert parser is not None
        answer = feed(parser, parts)
        assert answer.content == "Let me < look.", parts
        assert answer.parsed == [("weather", WEATHER), ("now", {})], parts


@pytest.mark.parametrize("name", TWO_CALLS)
def test_an_answer_without_calls_is_content(name):
    text = " It's {fine} < [today] to=functions \n"
    for parts in few_cuts(text):
        assert parse(TWO_CALLS[name][0], parts[:2]).content == "".join(parts[:2])


def test_calls_may_be_lines_between_two_marks():
    lines = CallFormat("<tool_calls>\n", ObjectSyntax("name", "arguments"), "\n</tool_calls>", "\n")
    text = f'<tool_calls>\n{{"name": "weather", "arguments": {W}}}\n{{"name": "now", "arguments": {{}}}}\n</tool_calls>'
    for parts in few_cuts(text):
        parser = AnswerParser([CallDivider(lines, frozenset())], has_tools=True)
        answer = feed(parser, parts)
        assert (answer.parsed, answer.content) == ([("weather", WEATHER), ("now", {})], ""), parts


def test_ids_that_the_model_writes_are_kept():
    assert parse(*TWO_CALLS["mistral small"][:1], [TWO_CALLS["mistral small"][1]]).ids[0] == "abcdefghi"
    assert parse(templates.KIMI_K2, [TWO_CALLS["kimi k2"][1]]).ids == [
        "functions.weather:0",
        "functions.now:1",
    ]
    text = '[TOOL_CALLS][{"name": "now", "id": "abc123456", "arguments": {}}]'
    assert parse(templates.MISTRAL_NEMO, [text]).ids == ["abc123456"]


def test_the_name_is_sent_first_and_arguments_as_they_arrive():
    parser = AnswerFormat(tokenizer(templates.HERMES)).parser(job(), "")
    assert parser is not None
    assert parser.feed('<tool_call>\n{"name": "weather"') == ([], None)
    (start, first), _ = parser.feed(', "arguments": {"ci')
    assert isinstance(start, CallStart) and start.name == "weather"
    assert first == CallArguments(0, '{"ci')
    assert parser.feed('ty": "Ro') == ([CallArguments(0, 'ty": "Ro')], None)
    assert parser.feed('me"}}\n</tool_call>') == ([CallArguments(0, 'me"}')], None)
    assert parser.calls == 1


def test_line_breaks_in_strings_are_escaped():
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ro\nme\\n"}}\n</tool_call>'
    for parts in few_cuts(text):
        assert parse(templates.HERMES, parts).calls == [("weather", '{"city": "Ro\\nme\\n"}')]


def test_arguments_written_as_a_string_are_read():
    text = '<tool_call>\n{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}\n</tool_call>'
    for parts in few_cuts(text):
        assert parse(templates.HERMES, parts).parsed == [("weather", {"city": "Rome"})]


def test_a_call_inside_another_object_is_read():
    text = '{"type": "function", "function": {"name": "weather", "parameters": {"city": "Rome"}}}'
    for parts in few_cuts(text):
        assert parse(templates.LLAMA_3_1, parts).parsed == [("weather", {"city": "Rome"})]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "weather", "arguments": {\'city\': 1}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "a b", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        "<tool_call>\nweather()\n</tool_call>",
        '<tool_call>\n{"name": "weather"',
        "<tool_call>",
        "<tool_call",
    ],
)
def test_what_is_no_call_is_content(text):
    for parts in few_cuts(text):
        parser = AnswerFormat(tokenizer(templates.HERMES)).parser(job(), "")
        assert parser is not None
        answer = feed(parser, parts)
        assert answer.content == text and parser.calls == 0, parts


def test_a_call_whose_arguments_never_end_is_content_and_does_not_count():
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ro'
    for parts in few_cuts(text):
        parser = AnswerFormat(tokenizer(templates.HERMES)).parser(job(), "")
        assert parser is not None
        assert feed(parser, parts).content == text and parser.calls == 0


def test_a_call_that_is_cut_by_max_tokens_stays_as_it_is():
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ro'
    for parts in few_cuts(text):
        answer = parse(templates.HERMES, parts, cut=True)
        assert answer.calls == [("weather", '{"city": "Ro')] and answer.content == ""


@pytest.mark.parametrize("name", TWO_CALLS)
def test_an_answer_that_is_cut_after_a_call_has_no_text_of_the_next(name):
    template, text = TWO_CALLS[name]
    made = AnswerFormat(tokenizer(template))
    seen = set()
    for end in range(len(text)):
        for parts in ([text[:end]], list(text[:end])):
            parser = made.parser(job(stop=("{", "<", "[", "t")), "")
            assert parser is not None
            pieces = [piece for part in parts for piece in parser.feed(part)[0]]
            rest, stop = parser.finish("", cut=True)
            if parser.calls:
                answer = Answer(pieces + rest)
                assert (answer.content, stop) == ("", None), text[:end]
                assert answer.calls[0][0] == "weather" and json.loads(answer.calls[0][1]) == WEATHER
                seen.add(end)
    assert len(seen) > 10


OPENED = {"hermes": "<tool_call>", "mistral nemo": "[TOOL_CALLS]", "mistral small": "[TOOL_CALLS]"}


@pytest.mark.parametrize("name", OPENED)
def test_an_answer_that_is_cut_in_the_head_of_its_first_call_is_what_came_before(name):
    template, text = TWO_CALLS[name]
    made, head = AnswerFormat(tokenizer(template)), text[: text.index('{"city"')]
    for end in range(len(OPENED[name]), len(head) + 1):
        for parts in few_cuts("Look: " + head[:end]):
            parser = made.parser(job(stop=("{", "<", "[", "wea")), "")
            assert parser is not None
            pieces = [piece for part in parts for piece in parser.feed(part)[0]]
            rest, stop = parser.finish("", cut=True)
            assert Answer(pieces + rest).content.rstrip() == "Look:" and stop is None, parts


@pytest.mark.parametrize("broken", ['{"name": "weather", "arguments": {"city" "Rome"}}', "weather()"])
def test_a_good_call_after_a_broken_one_counts(broken):
    broken = f"<tool_call>\n{broken}\n</tool_call>"
    good = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for parts in few_cuts(f"{broken}\n{good}"):
        parser = AnswerFormat(tokenizer(templates.HERMES)).parser(job(), "")
        assert parser is not None
        answer = feed(parser, parts)
        assert answer.calls[-1] == ("now", "{}") and parser.calls == 1, parts
        assert answer.content == broken, parts


@pytest.mark.parametrize(
    "text", ['{"name": "Ann", "parameters": {}}', '{"name": "weather"}', '{"a": {"name": 1}}']
)
def test_json_that_is_an_answer_is_no_call(text):
    for parts in few_cuts(text):
        answer = parse(templates.LLAMA_3_1, parts)
        assert (answer.content, answer.calls) == (text, []), parts


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (templates.GPT_OSS, "<|channel|>commentary to=functions.weather<|message|>{broken<|call|>after"),
        (templates.GEMMA_4, "<|tool_call>call:weather{city:Rome}<tool_call|>after"),
    ],
)
def test_a_call_of_a_family_that_cannot_be_read_is_content(template, text):
    for parts in few_cuts(text):
        answer = parse(template, parts)
        assert "weather" in answer.content and answer.content.endswith("after"), parts
        assert answer.calls == []


def test_a_call_whose_tool_has_no_proper_schema_is_read_or_content():
    odd = [tool("weather", city={"anyOf": 5}), tool("now")]
    text = TWO_CALLS["glm"][1]
    answer = parse(templates.GLM_4_5, list(text), tools=odd)
    assert answer.parsed == [("now", {})] and "<arg_value>Rome" in answer.content
    deep = "<|channel|>commentary to=functions.now<|message|>" + '{"a":' * 100_000
    assert parse(templates.GPT_OSS, [deep]).calls == []


@pytest.mark.parametrize("name", ["glm", "qwen3 coder", "minimax m2", "gemma 4", "gpt-oss"])
def test_a_call_of_a_family_that_is_cut_by_max_tokens_is_left_out(name):
    template, text = TWO_CALLS[name]
    text += "<|call|>" * (name == "gpt-oss")
    made = AnswerFormat(tokenizer(template))
    mark = re.match(r"<[^>]+>|\S+?functions\.", text.lstrip())
    assert mark is not None
    seen = set()
    for end in range(mark.end(), len(text) + 1):
        for parts in ([text[:end]], list(text[:end])):
            parser = made.parser(job(stop=("<", "weather")), "")
            assert parser is not None
            pieces = [piece for part in parts for piece in parser.feed(part)[0]]
            rest, stop = parser.finish("", cut=True)
            answer = Answer(pieces + rest)
            assert (answer.content.strip(), stop) == ("", None), text[:end]
            assert answer.parsed == [("weather", WEATHER), ("now", {})][: parser.calls], text[:end]
            seen.add(parser.calls)
    assert seen == {0, 1, 2}


# reasoning and calls in one answer

THOUGHT_AND_CALL = {
    "qwen3": (templates.QWEN3, "<think>\nhm\n</think>\n\n"),
    "qwen3 thinking": (templates.QWEN3_THINKING, "hm\n</think>\n\n"),
    "glm": (templates.GLM_4_5, "\n<think>hm</think>\n"),
    "minimax m2": (templates.MINIMAX_M2, "hm\n</think>\n\n"),
    "command r7b": (templates.COMMAND_R7B, "<|START_THINKING|>hm<|END_THINKING|>"),
    "deepseek r1": (templates.DEEPSEEK_R1, "hm\n</think>\n\n"),
    "gpt-oss": (templates.GPT_OSS, "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"),
    "gemma 4": (templates.GEMMA_4, "<|channel>thought\nhm\n<channel|>"),
}


@pytest.mark.parametrize("name", THOUGHT_AND_CALL)
def test_reasoning_and_calls_of_one_answer_are_divided(name):
    template, thought = THOUGHT_AND_CALL[name]
    of_calls = {"qwen3": "hermes", "qwen3 thinking": "hermes"}.get(name, name)
    prompt = tokenizer(template).apply_chat_template(
        [QUESTION], tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    made = AnswerFormat(tokenizer(template))
    for parts in few_cuts(thought + TWO_CALLS[of_calls][1]):
        parser = made.parser(job(), prompt)
        assert parser is not None
        answer = feed(parser, parts)
        assert (answer.reasoning, answer.content) == ("hm", ""), parts
        assert answer.parsed == [("weather", WEATHER), ("now", {})], parts


@pytest.mark.parametrize("tools", [TOOLS, []])
def test_channels_are_divided_with_and_without_tools(tools):
    text = (
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>analysis<|message|>Two.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>The answer.\n"
    )
    prompt = (
        "<|start|>user<|message|>a <|start|>assistant<|channel|>final<|message|><|end|><|start|>assistant"
    )
    for parts in few_cuts(text):
        answer = parse(templates.GPT_OSS, parts, prompt, tools=tools)
        assert (answer.reasoning, answer.content) == ("One.\nTwo.", "The answer.\n"), parts


def test_without_tools_a_call_is_content():
    parser = AnswerFormat(tokenizer(templates.QWEN3)).parser(job(tools=[]), "")
    assert parser is not None
    assert feed(parser, [TWO_CALLS["hermes"][1]]).content == TWO_CALLS["hermes"][1]
    assert AnswerFormat(tokenizer(templates.HERMES)).parser(job(tools=[]), "") is None


def test_the_tokenizers_own_response_template_comes_first():
    made = tokenizer(templates.HERMES)
    made.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "content": {},
            "tool_calls": {
                "open_pattern": r"!(?P<name>\w+) ",
                "close": "!",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
        },
    }
    parser = AnswerFormat(made).parser(job(), "")
    assert parser is not None
    assert feed(parser, ["a !weather {", '"city": "Rome"}!']).parsed == [("weather", {"city": "Rome"})]
    made.response_template = {"fields": {}}
    parser = AnswerFormat(made).parser(job(), "")
    assert parser is not None
    assert feed(parser, [TWO_CALLS["hermes"][1]]).parsed == [("weather", WEATHER), ("now", {})]


# limits of a request


def until_complete(parts: list[str]) -> Answer:
    """An answer without parallel calls, which ends when it is complete."""
    parser = AnswerFormat(tokenizer(templates.HERMES)).parser(job(parallel_tool_calls=False), "")
    assert parser is not None
    pieces: list[Piece] = []
    for part in parts:
        pieces += parser.feed(part)[0]
        if parser.complete:
            return Answer(pieces)
    raise AssertionError("it goes on without a call")


def test_without_parallel_calls_the_first_one_ends_the_answer():
    for parts in few_cuts(f"One moment. {TWO_CALLS['hermes'][1]}"):
        answer = until_complete(parts)
        assert answer.parsed == [("weather", WEATHER)] and answer.content == "One moment.", parts


def test_without_parallel_calls_the_first_one_is_that_after_a_broken_one():
    broken = '<tool_call>\n{"name": "now", "arguments": {"a": tru}}\n</tool_call>'
    for parts in few_cuts(f"{broken}\n{TWO_CALLS['hermes'][1]}"):
        answer = until_complete(parts)
        assert answer.content == broken, parts
        assert answer.calls[0][0] == "now" and answer.calls[1:] == [("weather", W)], parts


def test_stop_strings_end_the_content_and_not_a_call():
    text = f"See: {TWO_CALLS['hermes'][1]} STOP never"
    for parts in few_cuts(text):
        parser = AnswerFormat(tokenizer(templates.HERMES)).parser(job(stop=("STOP", "Rome")), "")
        assert parser is not None
        pieces: list[Piece] = []
        stop = None
        for part in parts:
            if stop is None:
                more, stop = parser.feed(part)
                pieces += more
        assert stop == "STOP" and Answer(pieces).parsed[0] == ("weather", WEATHER), parts
        assert Answer(pieces).content.rstrip() == "See:"


def test_markers_that_are_special_tokens_are_seen_only_with_tools():
    from workers.engines.chat.detokenizer import Vocabulary

    made = tokenizer(templates.MISTRAL_NEMO, special=("[TOOL_CALLS]", "[OTHER]"))
    format = AnswerFormat(made)
    ids = made("a[OTHER][TOOL_CALLS]b", add_special_tokens=False)["input_ids"]
    for tools, expected in ((TOOLS, "a[TOOL_CALLS]b"), ([], "ab")):
        detokenizer = format.detokenizer(Vocabulary.of(made), job(tools=tools))
        assert "".join(detokenizer.add(token)[0] for token in ids) == expected


def test_arguments_of_earlier_calls_are_text_where_the_template_wants_text():
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    history = job(messages=[QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}])
    for template, expected in (
        (templates.DEEPSEEK_R1, '{"city": "Rome"}'),
        (templates.QWEN3, {"city": "Rome"}),
        (templates.GLM_4_5, {"city": "Rome"}),
        (templates.GEMMA_4, {"city": "Rome"}),
    ):
        (message,) = AnswerFormat(tokenizer(template)).inputs.messages(history)[1:]
        assert message["tool_calls"][0]["function"]["arguments"] == expected


@pytest.mark.parametrize(("content", "expected"), [("", "hm"), ("text", None)])
def test_reasoning_beside_content_and_a_call_is_left_out_where_the_template_refuses_it(content, expected):
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": {}}}
    message = {"role": "assistant", "content": content, "tool_calls": [call], "reasoning_content": "hm"}
    made = AnswerFormat(tokenizer(templates.GPT_OSS)).inputs.messages(job(messages=[QUESTION, message]))
    assert made[1].get("thinking") == expected
    assert tokenizer(templates.GPT_OSS).apply_chat_template(made, tokenize=False)


@pytest.mark.parametrize(
    ("literal", "text", "expected"),
    [
        ("ab", "abc", 2),
        ("a b", "a\n bc", 4),
        ("a b", " ab", 3),
        ("ab", "a", MORE),
        ("ab", "", MORE),
        ("ab", "ac", DIFFERENT),
        ("", "x", 0),
        (" ", "", 0),
    ],
)
def test_spaces_do_not_count_when_a_literal_is_matched(literal, text, expected):
    assert match(literal, text) == expected


def test_halves_of_surrogate_pairs_are_replaced():
    """An escape makes them in JSON, and no text with one can be sent."""
    assert parse_object(r'{"a": "x\ud800", "b": "\ud83d\ude00"}') == {"a": "x\ufffd", "b": "\U0001f600"}
    assert write_json({"\udfff": "é"}) == '{"\ufffd": "é"}'
