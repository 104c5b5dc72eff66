"""How a model writes calls with a tag for each argument, found out from its chat template."""

import re
from typing import Any, NamedTuple

from workers.engines.chat.answer.call_format import NAME, PROBE_TOOL, answer_part
from workers.engines.chat.answer.probe import TemplateProbe
from workers.engines.chat.answer.thinking import ThinkTags

_KEYS = ("kkone", "kktwo")
_TEXTS, _NUMBERS = ("vvone", "vvtwo"), (71001, 71002)
_KEY_START = re.compile(r"\s*<[^<]*$")


class TagFormat(NamedTuple):
    """`opening`, a call, then `separator` and a further call, then `closing`.

    A call is a name and `after_name`, then for each argument `before_key`, its name, `before_text` or
    `before_json`, the value and `after_value`.
    """

    opening: str
    after_name: str
    before_key: str
    before_text: str
    before_json: str
    after_value: str
    separator: str
    closing: str


def derive_tags(probe: TemplateProbe, tags: ThinkTags | None) -> TagFormat | None:
    """Find the format of a template. Returns None if it doesn't write a call in such a way."""
    found = around_arguments(probe, tags)
    if found is None:
        return None
    parts, typed, more = found
    opening, after_name, before_text, between, _, end = parts
    start = _KEY_START.search(between)
    if start is None or not after_name.endswith(start[0]):
        return None
    after_value = between.removesuffix(start[0])
    separator = more[5]
    closing = end.partition(probe.turn_end)[0] if probe.turn_end else end
    if not (end.startswith(after_value) and separator.startswith(after_value)):
        return None
    return TagFormat(
        opening.lstrip(),
        after_name.removesuffix(start[0]),
        start[0],
        before_text,
        typed[2],
        after_value,
        separator.removeprefix(after_value),
        closing.removeprefix(after_value).rstrip(),
    )


def around_arguments(
    probe: TemplateProbe, tags: ThinkTags | None
) -> tuple[list[str], list[str], list[str]] | None:
    """Return what a template writes around the name, the keys and the values of a call with two arguments.

    That of a call with texts, of one with numbers, and of two calls with texts. None: it writes something
    else.
    """
    texts, numbers, two = (
        answer_part(_render(probe, values, count), tags)
        for values, count in ((_TEXTS, 1), (_NUMBERS, 1), (_TEXTS, 2))
    )
    parts = re.split("|".join((NAME, *_KEYS, *_TEXTS)), texts)
    more = re.split("|".join((NAME, *_KEYS, *_TEXTS)), two)
    typed = re.split("|".join((NAME, *_KEYS, *map(str, _NUMBERS))), numbers)
    return (parts, typed, more) if (len(parts), len(typed), len(more)) == (6, 6, 11) else None


def _render(probe: TemplateProbe, values: tuple[Any, Any], count: int) -> str | None:
    function = {"name": NAME, "arguments": dict(zip(_KEYS, values, strict=True))}
    calls = [{"id": f"callid00{at}", "type": "function", "function": function} for at in range(count)]
    return probe.answer({"role": "assistant", "content": "", "tool_calls": calls}, [PROBE_TOOL])
