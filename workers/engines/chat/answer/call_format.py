"""How a model writes calls of tools as JSON, found out from its chat template.

A turn with one call and a turn with two are rendered with a name and arguments that occur nowhere else. What
the template writes before, between and after them is the format.
"""

import re
from typing import Any, NamedTuple

from workers.engines.chat.answer.probe import TemplateProbe
from workers.engines.chat.answer.thinking import ThinkTags

NAME = "zzfunczz"
KEY, VALUE = "kk", "vv"
ID = "callid00"
"""With a digit added, nine characters as Mistral's templates require."""
ARGUMENTS = re.compile(r'\{\s*"kk"\s*:\s*"vv"\s*\}')

NAME_KEYS = frozenset({"name"})
ARGUMENTS_KEYS = frozenset({"arguments", "parameters"})
"""Keys that models write also where their template has others."""

_MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|\S+")
_FIELD = r'"\w+"\s*:\s*(?:"[^"]*"|[\w.+-]+)\s*,\s*'
_OBJECT_BEFORE_NAME = re.compile(rf'\{{\s*(?:{_FIELD})*"(\w+)"\s*:\s*"$')
_BEFORE_ARGUMENTS = re.compile(rf'"\s*,\s*(?:{_FIELD})*"(\w+)"\s*:\s*$')
_OBJECT_END = re.compile(r"[^{}]*?\}")

PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "zztoolzz",
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {KEY: {"type": "string", "description": "d"}},
            "required": [KEY],
        },
    },
}


class ObjectSyntax(NamedTuple):
    """A call is a JSON object that has the name and the arguments under these keys."""

    name_key: str
    arguments_key: str
    id_key: str | None = None


class MarkedSyntax(NamedTuple):
    """A call is a name, `before_id` and an id if there are ids, `before_arguments`, and the arguments.

    `numbered`: the name is followed by a colon and the number of the call. Both together, behind `id_prefix`,
    are then the id.
    """

    before_arguments: str
    before_id: str | None = None
    numbered: bool = False
    id_prefix: str = ""


class CallFormat(NamedTuple):
    """`opening`, a call, then `separator` and a further call, then `closing`. Spaces between don't count.

    `separator` is None where the template allows one call. `text_arguments`: the template takes the arguments
    of a message as text, and not as an object.
    """

    opening: str
    syntax: ObjectSyntax | MarkedSyntax
    closing: str
    separator: str | None = None
    text_arguments: bool = False

    @property
    def marker(self) -> str:
        """The beginning of the opening, in which there are no spaces."""
        found = _MARKER.match(self.opening)
        return found[0] if found else ""

    @property
    def at_start(self) -> bool:
        """Whether nothing but a call's own JSON shows that it is one: it must be the answer's beginning."""
        return not self.opening.strip()


def render_calls(probe: TemplateProbe, count: int, *, as_text: bool, own_ids: bool = False) -> str | None:
    """Return a turn with calls, behind the prompt for an answer. None if the template refuses it.

    `own_ids`: the ids are made of the names.
    """
    arguments: Any = f'{{"{KEY}": "{VALUE}"}}' if as_text else {KEY: VALUE}
    calls = [
        {
            "id": f"functions.{NAME}:{number}" if own_ids else f"{ID}{number}",
            "type": "function",
            "function": {"name": NAME, "arguments": arguments},
        }
        for number in range(count)
    ]
    return probe.answer({"role": "assistant", "content": "", "tool_calls": calls}, [PROBE_TOOL])


def takes_text(probe: TemplateProbe) -> bool:
    """Whether the template shows a call's arguments as JSON only if it gets them as text."""
    as_object, as_text = (render_calls(probe, 1, as_text=text) for text in (False, True))
    return not (as_object and ARGUMENTS.search(as_object)) and bool(as_text and ARGUMENTS.search(as_text))


def derive(probe: TemplateProbe, tags: ThinkTags | None) -> CallFormat | None:
    """Find the format of a template. Returns None if it does not write arguments as JSON after a name."""
    as_text = takes_text(probe)
    for own_ids in (False, True):
        one, two = (render_calls(probe, count, as_text=as_text, own_ids=own_ids) for count in (1, 2))
        if one is not None and NAME in one:
            return _derive(answer_part(one, tags), answer_part(two, tags), probe.turn_end, as_text)
    return None


def answer_part(turn: str | None, tags: ThinkTags | None) -> str:
    """Return what of a turn comes after the reasoning."""
    if turn is None:
        return ""
    head, _, _ = turn.partition(NAME)
    return turn[head.rfind(tags.close) + len(tags.close) :] if tags and tags.close in head else turn


def _derive(one: str, two: str, turn_end: str, as_text: bool) -> CallFormat | None:
    found = ARGUMENTS.search(one, one.find(NAME))
    if found is None:
        return None
    before, between = one[: one.find(NAME)], one[one.find(NAME) + len(NAME) : found.start()]
    after = one[found.end() :]
    second = ARGUMENTS.search(two)
    next_name = two.find(NAME, second.end()) if second else -1
    separator = two[second.end() : next_name] if second and next_name >= 0 else None
    named, valued = _OBJECT_BEFORE_NAME.search(before), _BEFORE_ARGUMENTS.match(between)
    if named and valued:
        opening, tail = before[: named.start()], _OBJECT_END.match(after)
        if tail is None:
            return None
        ids = re.search(rf'"(\w+)"\s*:\s*"{ID}\d"', named[0] + between + tail[0])
        if separator is not None:
            end = _OBJECT_END.match(separator)
            separator = separator[end.end() : separator.rfind("{")] if end else None
        syntax: ObjectSyntax | MarkedSyntax = ObjectSyntax(named[1], valued[1], ids[1] if ids else None)
        after = after[tail.end() :]
    else:
        opening, syntax = before, _marked(before, between)
        if not opening.strip() or ID in opening:
            return None
    closing = after.partition(turn_end)[0] if turn_end else after
    return CallFormat(opening.lstrip(), syntax, closing.rstrip(), separator, as_text)


def _marked(before: str, between: str) -> MarkedSyntax:
    if number := re.match(r":\d+", between):
        prefix = re.search(r"[\w.]*$", before)
        return MarkedSyntax(between[number.end() :], None, True, prefix[0] if prefix else "")
    before_id, found, before_arguments = between.partition(f"{ID}0")
    return MarkedSyntax(before_arguments, before_id) if found else MarkedSyntax(between)
