"""Reads one call as its text arrives: name, then arguments, and for a JSON object its end."""

import re
import secrets
import string
from enum import Enum, auto
from functools import lru_cache
from typing import Any

from protocol.jobs import FUNCTION_NAME
from workers.engines.chat.answer.call_format import (
    ARGUMENTS_KEYS,
    NAME_KEYS,
    CallFormat,
    MarkedSyntax,
    ObjectSyntax,
)
from workers.engines.chat.answer.json_text import ObjectText, parse_object, write_json
from workers.engines.chat.answer.pieces import CallArguments, CallStart, Piece

LONGEST_HEAD = 400
"""Characters of a marked call before its arguments, a name of 128 included."""

LONGEST_OBJECT_HEAD = 4096
"""The same of an object. With a longer one the call is sent when it is complete."""

_NAME = re.compile(FUNCTION_NAME)
_FIELD = r'"[^"\\]*"\s*:\s*(?:"(?:[^"\\]|\\.)*"|[\w.+-]+)\s*,\s*'
_FIRST_KEY = re.compile(r'\s*\{\s*"([^"\\]*)"')


class ReaderStatus(Enum):
    HEAD = auto()
    ARGUMENTS = auto()
    TAIL = auto()
    """Inside the object, behind its arguments."""
    DONE = auto()
    BROKEN = auto()
    """What was read is no call."""


class CallReader:
    """Reads call `number` of an answer."""

    def __init__(self, format: CallFormat, names: frozenset[str], number: int) -> None:
        """`names`: those of the request's tools. Where nothing else marks a call, its name must be one."""
        self._format = format
        self._names = names
        self._number = number
        self._pattern = _head(format.syntax)
        self._text = ""
        """The head, then the arguments, then nothing."""
        self._object = ObjectText()
        self.status = ReaderStatus.HEAD
        self.started = False
        """Whether its beginning was returned."""
        self.rest = ""
        """What follows the call, when it is DONE."""

    def feed(self, text: str) -> list[Piece]:
        """Return the pieces that `text` completes."""
        pieces: list[Piece] = []
        if self.status is ReaderStatus.HEAD:
            text = self._read_head(text, pieces)
        if self.status is ReaderStatus.ARGUMENTS and text:
            text = self._read_arguments(text, pieces)
        if self.status is ReaderStatus.TAIL:
            _, end = self._object.read(text)
            if end >= 0:
                self._done(text[end:])
        return pieces

    def finish(self, cut: bool) -> None:
        """No text follows. A call whose arguments are not complete is none, unless the answer was cut."""
        if self.status is ReaderStatus.HEAD or (self.status is ReaderStatus.ARGUMENTS and not cut):
            self.status = ReaderStatus.BROKEN

    def _done(self, rest: str) -> None:
        self.status, self.rest = ReaderStatus.DONE, rest

    def _read_head(self, text: str, pieces: list[Piece]) -> str:
        """Return the text behind the head, or none."""
        self._text += text
        found = self._pattern.match(self._text, 0, LONGEST_OBJECT_HEAD)
        if isinstance(self._format.syntax, MarkedSyntax):
            if found is None:
                if len(self._text) > LONGEST_HEAD:
                    self.status = ReaderStatus.BROKEN
                return ""
            groups = found.groupdict()
            id = groups.get("id")
            if number := groups.get("number"):
                id = f"{self._format.syntax.id_prefix}{groups['name']}:{number}"
            return self._start(groups["name"], id, found.end(), pieces)
        return self._read_object_head(text, found, pieces)

    def _read_object_head(self, text: str, found: re.Match[str] | None, pieces: list[Piece]) -> str:
        first = _FIRST_KEY.match(self._text, 0, LONGEST_OBJECT_HEAD)
        if self._text.strip()[:1] not in ("", "{") or (
            self._format.at_start and first and first[1] not in self._keys
        ):
            self.status = ReaderStatus.BROKEN
            return ""
        _, end = self._object.read(text)
        if found is not None and (fields := parse_object(found[0] + "null}")):
            name = _first(fields, self._name_keys)
            if name is not None:
                return self._start(name, self._id_in(fields), found.end(), pieces)
        if end >= 0:
            at = len(self._text) - len(text) + end
            self._read_object(self._text[:at], self._text[at:], pieces)
        return ""

    def _read_object(self, text: str, rest: str, pieces: list[Piece]) -> None:
        """Read a whole object, with its keys in any order."""
        fields = parse_object(text) or {}
        inner = fields["function"] if isinstance(fields.get("function"), dict) else fields
        arguments = _first(inner, self._arguments_keys)
        if arguments is None and not self._format.at_start:
            arguments = {}
        if isinstance(arguments, str):
            arguments = parse_object(arguments or "{}")
        self._start(_first(inner, self._name_keys), self._id_in(fields), 0, pieces)
        if not isinstance(arguments, dict) or self.status is ReaderStatus.BROKEN:
            pieces.clear()
            self.started, self.status = False, ReaderStatus.BROKEN
            return
        pieces.append(CallArguments(self._number, write_json(arguments)))
        self._done(rest)

    def _start(self, name: Any, id: str | None, end: int, pieces: list[Piece]) -> str:
        valid = isinstance(name, str) and _NAME.fullmatch(name)
        if not valid or (self._format.at_start and name not in self._names):
            self.status = ReaderStatus.BROKEN
            return ""
        pieces.append(CallStart(self._number, id or new_id(), name))
        self.started, self.status = True, ReaderStatus.ARGUMENTS
        text, self._text = self._text[end:], ""
        self._object = ObjectText()
        return text

    def _read_arguments(self, text: str, pieces: list[Piece]) -> str:
        """Return the text behind the arguments, or none."""
        own, end = self._object.read(text)
        self._text += own
        if end >= 0 and parse_object(self._text) is None:
            self.status = ReaderStatus.BROKEN
            return ""
        pieces.append(CallArguments(self._number, own))
        if end < 0:
            return ""
        if isinstance(self._format.syntax, MarkedSyntax):
            self._done(text[end:])
            return ""
        self.status, self._object = ReaderStatus.TAIL, ObjectText(depth=1)
        return text[end:]

    @property
    def arguments_complete(self) -> bool:
        return self.status in (ReaderStatus.TAIL, ReaderStatus.DONE)

    @property
    def _name_keys(self) -> frozenset[str]:
        syntax = self._format.syntax
        return NAME_KEYS | {syntax.name_key} if isinstance(syntax, ObjectSyntax) else NAME_KEYS

    @property
    def _arguments_keys(self) -> frozenset[str]:
        syntax = self._format.syntax
        return ARGUMENTS_KEYS | {syntax.arguments_key} if isinstance(syntax, ObjectSyntax) else ARGUMENTS_KEYS

    @property
    def _keys(self) -> frozenset[str]:
        return self._name_keys | self._arguments_keys | {"type", "id", "function"}

    def _id_in(self, fields: dict[str, Any]) -> str | None:
        syntax = self._format.syntax
        id = fields.get(syntax.id_key) if isinstance(syntax, ObjectSyntax) and syntax.id_key else None
        return id if isinstance(id, str) and 0 < len(id) <= 64 else None


def new_id() -> str:
    """Return an id for a call, which also the templates accept that require nine letters or digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def _first(fields: dict[str, Any], keys: frozenset[str]) -> Any:
    return next((value for key, value in fields.items() if key in keys and value is not None), None)


@lru_cache
def _head(syntax: ObjectSyntax | MarkedSyntax) -> re.Pattern[str]:
    """What comes before the arguments, which begin with a brace."""
    if isinstance(syntax, ObjectSyntax):
        keys = "|".join(map(re.escape, sorted(ARGUMENTS_KEYS | {syntax.arguments_key})))
        return re.compile(rf'\s*\{{\s*(?:{_FIELD})*"(?:{keys})"\s*:\s*(?=\{{)')
    name = r"\s*(?P<name>[A-Za-z0-9_.:/-]{1,128}?)"
    number = r":(?P<number>\d{1,4})" if syntax.numbered else ""
    id = ""
    if syntax.before_id is not None:
        id = rf"(?:\s*{_spaced(syntax.before_id)}\s*(?P<id>[\w-]{{1,64}}))?"
    return re.compile(rf"{name}{number}{id}\s*(?:{_spaced(syntax.before_arguments)})?\s*(?=\{{)")


def _spaced(literal: str) -> str:
    return r"\s*".join(map(re.escape, literal.split()))
