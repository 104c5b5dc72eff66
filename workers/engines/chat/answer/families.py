"""Families whose calls are not JSON after a name, or whose answers have channels.

Each is a response template of transformers, and a sign by which a chat template's own call shows it.
"""

import re
from typing import Any, NamedTuple

from workers.engines.chat.answer.call_format import KEY, NAME, VALUE, CallFormat, ObjectSyntax

_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_NAME = r"(?P<name>[A-Za-z0-9_.:/-]+)"


class Family(NamedTuple):
    """`sign`: a regular expression for a call of `NAME` with the argument `KEY`.

    `template`: see transformers.

    `openings`: texts that show a call to the template's parser. `closings`: texts that end a value or a call
    for it, wherever they are. Each has "<" at its beginning and nowhere else.
    """

    sign: str
    template: dict[str, Any]
    openings: tuple[str, ...]
    closings: tuple[str, ...]


def _marked_up(opening: str, closing: str, argument: str, end: str = "(?!)") -> dict[str, Any]:
    """Return the template of calls whose arguments have tags. All are regular expressions.

    `end`: what follows the last call, or each of them, and is left out.
    """
    return {
        # nothing of a prompt is read
        "start_anchor": "\0",
        "fields": {
            "content": {"content_args": {"strip": False}},
            "tool_calls": {
                "open_pattern": opening,
                "close_pattern": closing,
                "repeats": True,
                "content": "xml-inline",
                "content_args": {"tag_pattern": argument},
                "transform": _CALL,
            },
            "end": {"open_pattern": end, "close_pattern": "", "repeats": True},
        },
    }


_HARMONY_TO = rf"to=functions\.{_NAME}"
_HARMONY = {
    "start_anchor": "<|start|>assistant",
    "fields": {
        "rest": {},
        "thinking": {
            "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>",
            "close_pattern": r"<\|end\|>|(?=<\|start\|>)",
            "repeats": True,
        },
        "content": {
            "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary)\s*"
            r"(?:<\|constrain\|>\w+)?<\|message\|>",
            "close_pattern": r"<\|end\|>|<\|return\|>|(?=<\|start\|>)",
            "repeats": True,
        },
        "tool_calls": {
            "open_pattern": r"(?:<\|start\|>assistant)?(?:"
            rf"<\|channel\|>(?:commentary|analysis)\s*{_HARMONY_TO}"
            rf"|\s*{_HARMONY_TO}<\|channel\|>(?:commentary|analysis))"
            r"\s*(?:<\|constrain\|>)?\s*(?:json)?\s*<\|message\|>",
            "close_pattern": r"<\|call\|>|<\|end\|>|(?=<\|start\|>)",
            "repeats": True,
            "content": "json",
            "transform": _CALL,
        },
    },
}
_GEMMA = {
    "start_anchor": "<|turn>model\n",
    "fields": {
        "content": {"content_args": {"strip": False}},
        "thinking": {"open": "<|channel>thought", "close": "<channel|>", "repeats": True},
        "tool_calls": {
            "open_pattern": rf"(?:<\|tool_call>|<start_function_call>)call:{_NAME}(?=\{{)",
            "close": ["<tool_call|>", "<end_function_call>"],
            "repeats": True,
            "content": "json",
            "content_args": {
                "unquoted_keys": True,
                "string_delims": [['<|"|>', '<|"|>'], ["<escape>", "<escape>"]],
            },
            "transform": _CALL,
        },
    },
}

FAMILIES: dict[str, Family] = {
    "harmony": Family(
        rf"to=functions\.{NAME}<\|channel\|>",
        _HARMONY,
        (),
        ("<|call|>", "<|end|>", "<|return|>", "<|start|>"),
    ),
    "gemma4": Family(
        rf"call:{NAME}\{{{KEY}:",
        _GEMMA,
        ("<|tool_call>", "<start_function_call>"),
        ("<tool_call|>", "<end_function_call>", '<|"|>', "<escape>"),
    ),
    "qwen3_coder": Family(
        rf"<function={NAME}>\s*<parameter={KEY}>",
        _marked_up(
            rf"(?:<(?:seed:)?tool_call>\s*)?<function={_NAME}>",
            "</function>",
            r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>",
            "</(?:seed:)?tool_call>",
        ),
        ("<function=",),
        ("</parameter>", "</function>"),
    ),
    "glm": Family(
        rf"{NAME}\s*<arg_key>{KEY}</arg_key>\s*<arg_value>{VALUE}",
        _marked_up(
            rf"<tool_call>\s*{_NAME}\s*(?=<)",
            "</tool_call>",
            r"<arg_key>\s*(?P<key>[^<]+?)\s*</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
        ),
        ("<tool_call>",),
        ("</arg_value>", "</tool_call>"),
    ),
    "invoke": Family(
        rf'invoke name="{NAME}">\s*<(?:｜DSML｜)?parameter name="{KEY}"',
        _marked_up(
            rf'(?:<(?:minimax:|｜DSML｜)(?:tool_calls?|function_calls)>\s*)?<(?:｜DSML｜)?invoke name="{_NAME}">',
            "</(?:｜DSML｜)?invoke>",
            r'<(?:｜DSML｜)?parameter name="(?P<key>[^"]+)"(?: string="(?:true|false)")?>'
            r"(?P<value>.*?)</(?:｜DSML｜)?parameter>",
            "</(?:minimax:|｜DSML｜)(?:tool_calls?|function_calls)>",
        ),
        ("<invoke name=", "<｜DSML｜invoke name="),
        ("</parameter>", "</invoke>", "</｜DSML｜parameter>", "</｜DSML｜invoke>"),
    ),
}

JSON_FORMATS: dict[str, CallFormat] = {
    "hermes": CallFormat("<tool_call>\n", ObjectSyntax("name", "arguments"), "\n</tool_call>"),
    "llama3_json": CallFormat("", ObjectSyntax("name", "parameters"), ""),
    "mistral": CallFormat("[TOOL_CALLS][", ObjectSyntax("name", "arguments", "id"), "]", ", "),
}
"""For `tool_format` of the catalogue, where a chat template doesn't show the calls that its model writes."""


def family_of(turn: str) -> str | None:
    """Return the name of the family that writes a call of the probe in this way."""
    return next((name for name, family in FAMILIES.items() if re.search(family.sign, turn)), None)


def without_calls(template: dict[str, Any]) -> dict[str, Any]:
    """Return a response template for requests without tools: what looks like a call is content."""
    fields = {name: field for name, field in template["fields"].items() if name != "tool_calls"}
    return {**template, "fields": fields}
