"""Reasoning: its tags found in chat templates, and answers divided at them wherever their text is cut."""

from collections.abc import Iterator
from itertools import combinations, groupby, pairwise
from typing import Any

import pytest
from transformers import GenerationConfig

from protocol.errors import UnsupportedParameter
from protocol.jobs import ChatJob, SamplingParams
from tests.engines import chat_templates as templates
from tests.engines.tiny_chat import VOCABULARY, make_tokenizer
from workers.engines.chat.answer.format import AnswerFormat
from workers.engines.chat.answer.parser import AnswerParser
from workers.engines.chat.answer.pieces import CallStart, Content, Piece, Reasoning
from workers.engines.chat.answer.probe import TemplateProbe
from workers.engines.chat.answer.template_inputs import TemplateInputs
from workers.engines.chat.answer.thinking import ThinkDivider, ThinkTags
from workers.engines.chat.prompt import PromptBuilder

QUESTION = {"role": "user", "content": "question"}
THINK = ThinkTags("<think>", "</think>")


def tokenizer(template: str, special: tuple[str, ...] = ()) -> Any:
    made = make_tokenizer()
    made.chat_template = template
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def job(*messages: dict[str, Any], **fields: Any) -> ChatJob:
    sampling = SamplingParams(stop=fields.pop("stop", ()))
    return ChatJob(id="r", model="tiny", messages=list(messages or [QUESTION]), sampling=sampling, **fields)


def joined(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Return the pieces with neighbours of one kind joined."""
    return [
        (kind.__name__, "".join(piece.text for piece in same if not isinstance(piece, CallStart)))
        for kind, same in groupby(pieces, lambda piece: type(piece))
    ]


def every_cut(text: str, cuts: int = 2) -> Iterator[list[str]]:
    """Yield the text cut at every combination of two places, and into single characters."""
    for places in combinations(range(len(text) + 1), cuts):
        bounds = [0, *places, len(text)]
        yield [text[a:b] for a, b in pairwise(bounds)]
    yield list(text)


def divide(parts: list[str], **state: bool) -> list[Piece]:
    divider = ThinkDivider(THINK, **{"opened": False, **state})
    return [*(piece for part in parts for piece in divider.feed(part)), *divider.finish(cut=False)]


# tags


@pytest.mark.parametrize(
    ("template", "tags"),
    [
        (templates.QWEN3, ("<think>", "</think>")),
        (templates.QWEN3_THINKING, ("<think>", "</think>")),
        (templates.QWEN3.replace("think>", "seed:think>"), ("<seed:think>", "</seed:think>")),
        (templates.QWEN3.replace("think>", "odd>"), ("<odd>", "</odd>")),
        (templates.DEEPSEEK_R1, ("<think>", "</think>")),
        (templates.DEEPSEEK_V3_1, ("<think>", "</think>")),
        (templates.MAGISTRAL, ("[THINK]", "[/THINK]")),
        (templates.COMMAND_R7B, ("<|START_THINKING|>", "<|END_THINKING|>")),
        (templates.GLM_4_5, ("<think>", "</think>")),
        (templates.MINIMAX_M2, ("<think>", "</think>")),
        (templates.HERMES, None),
        (templates.LLAMA_3_1, None),
        (templates.MISTRAL_NEMO, None),
        (templates.GEMMA_3, None),
        (templates.GPT_OSS, None),
    ],
)
def test_the_tags_are_those_of_the_template(template, tags):
    assert ThinkTags.of(TemplateProbe(tokenizer(template))) == tags


def test_the_tags_of_several_templates_of_a_tokenizer_are_found():
    made = tokenizer(templates.HERMES)
    made.chat_template = {"default": templates.QWEN3, "tool_use": templates.HERMES}
    assert ThinkTags.of(TemplateProbe(made)) == THINK


def test_a_model_without_tags_has_no_parser():
    assert AnswerFormat(tokenizer(templates.HERMES)).parser(job(), "prompt") is None


# dividing

ANSWERS = [
    ("<think>\nFirst.\n\nThen.\n</think>\n\nThe answer.\n", "First.\n\nThen.", "The answer.\n"),
    ("\n <think>a</think>b", "a", "b"),
    ("<think></think>b", "", "b"),
    ("<think>\n\n</think>\n\n", "", ""),
    ("<think>a < b </ c </thin d</think>e </think> f", "a < b </ c </thin d", "e </think> f"),
    ("<think>never closed", "never closed", ""),
    ("<think>cut at its end</thi", "cut at its end</thi", ""),
    ("<thinking is hard", "", "<thinking is hard"),
    ("<thi", "", "<thi"),
    (" no tags\n at all ", "", " no tags\n at all "),
    ("later <think>a</think>", "", "later <think>a</think>"),
    ("", "", ""),
]


@pytest.mark.parametrize(("text", "reasoning", "content"), ANSWERS)
def test_an_answer_is_divided_wherever_it_is_cut(text, reasoning, content):
    expected = [("Reasoning", reasoning)] * bool(reasoning) + [("Content", content)] * bool(content)
    for parts in every_cut(text):
        assert joined(divide(parts)) == expected, parts


@pytest.mark.parametrize("text", ["a\n</think>\n\nb", "\na</think>b", "<think>\na</think>b"])
def test_after_a_prompt_that_ends_with_the_opening_tag_the_answer_begins_inside(text):
    for parts in every_cut(text):
        assert joined(divide(parts, opened=True)) == [("Reasoning", "a"), ("Content", "b")], parts


def test_text_that_can_be_no_tag_is_sent_at_once():
    divider = ThinkDivider(THINK, opened=False)
    assert divider.feed("<think>") == [] and divider.thinking
    assert divider.feed("one ") == [Reasoning("one")]
    assert divider.feed("two") == [Reasoning(" two")]
    assert divider.feed("</") == []
    assert divider.feed("b>") == [Reasoning("</b>")]
    assert divider.feed("</think>") == [] and not divider.thinking
    assert divider.feed("answer ") == [Content("answer ")]


# the beginning, which depends on the prompt


def first_pieces(template: str, text: str, *messages: dict[str, Any], **fields: Any) -> list[tuple[str, str]]:
    """Build a prompt of the template, and divide an answer to it."""
    builder = PromptBuilder(tokenizer(template), GenerationConfig(), VOCABULARY, 1024)
    answer = builder.build(job(*messages, **fields)).sequences[0].answer
    assert answer is not None
    pieces, stop = answer.feed(text)
    rest, _ = answer.finish("", cut=False)
    assert stop is None
    return joined(pieces + rest)


@pytest.mark.parametrize(
    ("template", "arguments", "inside"),
    [
        (templates.QWEN3, {}, False),
        (templates.QWEN3, {"enable_thinking": False}, False),
        (templates.QWEN3_THINKING, {}, True),
        (templates.DEEPSEEK_R1, {}, True),
        (templates.DEEPSEEK_V3_1, {}, False),
        (templates.DEEPSEEK_V3_1, {"thinking": True}, True),
        (templates.MINIMAX_M2, {}, True),
    ],
)
def test_the_prompts_end_decides_where_the_answer_begins(template, arguments, inside):
    expected = [("Reasoning" if inside else "Content", "text")]
    assert first_pieces(template, "text", chat_template_kwargs=arguments) == expected


def test_a_tag_in_a_question_opens_nothing():
    question = {"role": "user", "content": "what is <think>"}
    assert first_pieces(templates.QWEN3, "text", question) == [("Content", "text")]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("<think>I was", [("Reasoning", "think"), ("Content", "ing")]),
        ("<think>I was</think>It is", [("Content", " think</think>ing")]),
        ("It is", [("Content", " think</think>ing")]),
    ],
)
def test_a_message_is_continued_where_it_ends(message, expected):
    start = {"role": "assistant", "content": message}
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{# <think></think> #}"
    fields: dict[str, Any] = {"continue_final_message": True}
    assert first_pieces(template, " think</think>ing", QUESTION, start, **fields) == expected


# stop strings, counts, special tokens


def parse(answer: AnswerParser, parts: list[str]) -> tuple[list[tuple[str, str]], str | None]:
    sent: list[Piece] = []
    for part in parts:
        pieces, stop = answer.feed(part)
        sent += pieces
        if stop is not None:
            return joined(sent), stop
    pieces, stop = answer.finish("", cut=False)
    return joined(sent + pieces), stop


def test_stop_strings_end_the_content_and_not_the_reasoning():
    text = "<think>a STOP b</think>\n\nc STOP d"
    for parts in every_cut(text):
        answer = AnswerParser([ThinkDivider(THINK, opened=False)], ("STOP", "\n\n"))
        assert parse(answer, parts) == ([("Reasoning", "a STOP b"), ("Content", "c ")], "STOP"), parts


def test_text_held_back_for_a_stop_string_is_sent_at_the_end():
    answer = AnswerParser([ThinkDivider(THINK, opened=False)], ("STOP",))
    assert parse(answer, ["<think>a</think>b S", "TO"]) == ([("Reasoning", "a"), ("Content", "b STO")], None)


def test_before_min_tokens_stop_strings_are_text():
    answer = AnswerParser([ThinkDivider(THINK, opened=False)], ("STOP",))
    assert answer.feed("a STOP", may_stop=False) == ([Content("a STOP")], None)
    assert answer.feed("STOP") == ([], "STOP")


def test_the_tokens_of_the_reasoning_and_its_tags_are_counted():
    answer = AnswerParser([ThinkDivider(THINK, opened=False)])
    for part in ("<think>", "\n", "one", "", " two", "</thi", "nk>", "\n\n", "answer"):
        answer.feed(part)
    assert answer.reasoning_tokens == 7


def test_tags_that_are_special_tokens_are_seen():
    made = tokenizer(templates.MAGISTRAL, special=("[THINK]", "[/THINK]", "[OTHER]"))
    builder = PromptBuilder(made, GenerationConfig(), len(made), 1024)
    sequence = builder.build(job()).sequences[0]
    assert sequence.answer is not None
    sent: list[Piece] = []
    for token in made("[THINK]thé re[OTHER]ason[/THINK]answer", add_special_tokens=False)["input_ids"]:
        text, _ = sequence.detokenizer.add(token)
        sent += sequence.answer.feed(text)[0]
    assert joined(sent) == [("Reasoning", "thé reason"), ("Content", "answer")]


# what a request sends to the template


def inputs(template: str) -> TemplateInputs:
    return TemplateInputs(TemplateProbe(tokenizer(template)))


@pytest.mark.parametrize(
    ("template", "effort", "expected"),
    [
        (templates.GPT_OSS, "high", {"reasoning_effort": "high"}),
        (templates.QWEN3, "none", {"enable_thinking": False}),
        (templates.QWEN3, "low", {"enable_thinking": True}),
        (templates.DEEPSEEK_V3_1, "medium", {"thinking": True}),
        (templates.GEMMA_3, None, {}),
    ],
)
def test_reasoning_effort_is_what_the_template_calls_it(template, effort, expected):
    assert inputs(template).variables(job(reasoning_effort=effort)) == expected


def test_reasoning_effort_wins_over_the_catalogues_arguments():
    arguments = {"enable_thinking": False, "tone": "dry"}
    made = inputs(templates.QWEN3).variables(job(reasoning_effort="high", chat_template_kwargs=arguments))
    assert made == {"enable_thinking": True, "tone": "dry"}


@pytest.mark.parametrize("template", [templates.LLAMA_3_1, templates.DEEPSEEK_R1])
def test_a_model_whose_reasoning_cannot_be_set_refuses_reasoning_effort(template):
    with pytest.raises(UnsupportedParameter, match="not supported by model 'tiny'") as caught:
        inputs(template).variables(job(reasoning_effort="low"))
    assert caught.value.param == "reasoning_effort"


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (templates.QWEN3, "reasoning_content"),
        (templates.GEMMA_4, "reasoning"),
        (templates.GPT_OSS, "thinking"),
    ],
)
def test_earlier_reasoning_has_the_name_that_the_template_reads(template, name):
    message = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}
    made = inputs(template).messages(job(QUESTION, message))
    assert made == [QUESTION, {"role": "assistant", "content": "4", name: "2 + 2"}]
