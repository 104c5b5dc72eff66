"""Reads grammars in GBNF, the notation of llama.cpp."""

import re
from typing import NamedTuple

MAX_DEPTH = 20
"""Parentheses within parentheses."""

ANY = 0x110000
"""Number of characters."""

MAX_REPEATS = 1000
"""Repetitions in a grammar: *, +, ? and braces."""

MAX_REPEAT = 10_000
"""A number in braces."""

_FIRST_RULE = re.compile(r"(?:[ \t\r\n]|#[^\n]*\n)*[\w-]+[ \t\r\n]*::=")

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\n]*)
    |(?P<name>[A-Za-z0-9_-]+)
    |(?P<define>::=)
    |(?P<text>"(?:\\.|[^"\\])*")
    |(?P<chars>\[(?:\\.|[^\]\\])*\])
    |(?P<repeat>[*+?]|\{[\d, \t]*\})
    |(?P<mark>[|().])""",
    re.VERBOSE | re.DOTALL,
)

_CHARACTER = re.compile(
    r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\([^A-Za-z0-9]|[nrt])|([^\\])", re.DOTALL
)

_CONTROL = {"n": "\n", "r": "\r", "t": "\t"}

_BRACES = re.compile(r"\{[ \t]*(\d{0,6})[ \t]*(,?)[ \t]*(\d{0,6})[ \t]*\}")


class Token(NamedTuple):
    kind: str
    text: str
    line: int


class Node(NamedTuple):
    """A part of a rule."""

    kind: str
    """`regex` (text: a regular expression), `rule` (text: its name), `sequence`, `choice`, `repeat`."""
    text: str = ""
    """Of a `repeat`: its operator in Lark."""
    parts: tuple["Node", ...] = ()
    line: int = 0
    size: int = 1
    """Of a `regex`: how many characters the first of its text may be."""

    def references(self) -> list["Node"]:
        """The rules that it refers to."""
        if self.kind == "rule":
            return [self]
        return [reference for part in self.parts for reference in part.references()]


def is_gbnf(text: str) -> bool:
    """Whether a grammar begins with a rule of GBNF, NAME ::=."""
    return _FIRST_RULE.match(text) is not None


def read(text: str, max_rules: int) -> dict[str, Node]:
    """Return a grammar's rules by their names. Raises ValueError, with a text that quotes nothing."""
    return _Reader(text, max_rules).rules()


class _Reader:
    """Parses a grammar. Line breaks mean nothing, so that a rule may go on in the next line."""

    def __init__(self, text: str, max_rules: int) -> None:
        self._tokens = _tokens(text)
        self._max_rules = max_rules
        self._at = 0
        self._repeats = 0

    def rules(self) -> dict[str, Node]:
        rules: dict[str, Node] = {}
        while self._peek().kind != "end":
            name = self._next()
            if name.kind != "name" or self._next().kind != "define":
                raise _error(name, "expected a rule, NAME ::= …")
            if name.text in rules:
                raise _error(name, "a rule of this name exists already")
            rules[name.text] = self._choice(0)
            if self._peek().text == ")":
                raise _error(self._peek(), "a parenthesis was not opened")
            if len(rules) > self._max_rules:
                raise ValueError(f"a grammar may have at most {self._max_rules} rules")
        if "root" not in rules:
            raise ValueError("a grammar in GBNF needs a rule root")
        for node in rules.values():
            for reference in node.references():
                if reference.text not in rules:
                    raise ValueError(f"line {reference.line}: this rule is not defined")
        return rules

    def _choice(self, depth: int) -> Node:
        parts = [self._sequence(depth)]
        while self._peek().text == "|":
            self._next()
            parts.append(self._sequence(depth))
        return parts[0] if len(parts) == 1 else Node("choice", parts=tuple(parts))

    def _sequence(self, depth: int) -> Node:
        parts: list[Node] = []
        before = ""
        while not self._ends():
            token = self._next()
            if token.kind == "repeat":
                if before in ("", "repeat"):
                    raise _error(token, "nothing that can be repeated stands before this repetition")
                self._repeats += 1
                if self._repeats > MAX_REPEATS:
                    raise ValueError(f"a grammar may have at most {MAX_REPEATS} repetitions")
                parts[-1] = Node("repeat", _repetition(token), (parts[-1],))
            elif token.text == "(":
                if depth == MAX_DEPTH:
                    raise _error(token, f"parentheses may be nested {MAX_DEPTH} times")
                parts.append(self._choice(depth + 1))
                if self._next().text != ")":
                    raise _error(token, "a parenthesis is not closed")
            else:
                parts.append(_atom(token))
            before = token.kind
        return parts[0] if len(parts) == 1 else Node("sequence", parts=tuple(parts))

    def _ends(self) -> bool:
        """Whether a sequence ends here: at `|`, `)`, the next rule or the end."""
        token = self._peek()
        following = self._tokens[min(self._at + 1, len(self._tokens) - 1)]
        next_rule = token.kind == "name" and following.kind == "define"
        return next_rule or token.kind == "end" or (token.kind == "mark" and token.text in "|)")

    def _peek(self) -> Token:
        return self._tokens[self._at]

    def _next(self) -> Token:
        token = self._tokens[self._at]
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return token


def _tokens(text: str) -> list[Token]:
    tokens, at, line = [], 0, 1
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"line {line}: this is not a part of GBNF")
        if match.lastgroup != "space":
            tokens.append(Token(str(match.lastgroup), match[0], line))
        line += match[0].count("\n")
        at = match.end()
    return [*tokens, Token("end", "", line)]


def _atom(token: Token) -> Node:
    if token.kind == "name":
        return Node("rule", token.text, line=token.line)
    if token.kind == "text":
        characters = _characters(token, token.text[1:-1])
        return Node("regex", f"/{''.join(map(_escaped, characters))}/" if characters else '""')
    if token.kind == "chars":
        written, size = _class(token)
        return Node("regex", f"/{written}/", size=size)
    if token.text == ".":
        return Node("regex", "/(?s:.)/", size=ANY)
    raise _error(token, "this is not expected here")


def _class(token: Token) -> tuple[str, int]:
    """Write characters in brackets as a regular expression. Returns how many they are, too."""
    inner = token.text[1:-1]
    negated = inner.startswith("^")
    given = _given(token, inner[negated:])
    if not given:
        raise _error(token, "brackets without characters")
    written, at, size = [], 0, ANY if negated else 0
    while at < len(given):
        first = last = given[at][1]
        if at + 2 < len(given) and given[at + 1] == (False, "-"):
            last = given[at + 2][1]
            at += 2
        if first > last:
            raise _error(token, "a range of characters ends before it begins")
        written.append(_escaped(first) if first == last else f"{_escaped(first)}-{_escaped(last)}")
        size += ord(last) - ord(first) + 1
        at += 1
    return f"[{'^' if negated else ''}{''.join(written)}]", size


def _characters(token: Token, text: str) -> list[str]:
    return [character for _, character in _given(token, text)]


def _given(token: Token, text: str) -> list[tuple[bool, str]]:
    """The characters that a text means, and whether each was escaped."""
    found, at = [], 0
    while at < len(text):
        match = _CHARACTER.match(text, at)
        if match is None:
            raise _error(token, "this escape is not supported")
        number = match[1] or match[2] or match[3]
        if number is not None and (int(number, 16) > 0x10FFFF or 0xD800 <= int(number, 16) < 0xE000):
            raise _error(token, "an escape is not a character")
        plain = match[5] if match[4] is None else _CONTROL.get(match[4], match[4])
        found.append((match[5] is None, plain if number is None else chr(int(number, 16))))
        at = match.end()
    return found


def _escaped(character: str) -> str:
    plain = character.isascii() and character.isalnum()
    return character if plain else f"\\u{{{ord(character):x}}}"


def _repetition(token: Token) -> str:
    if token.text in "*+?":
        return token.text
    match = _BRACES.fullmatch(token.text)
    if match is None or not (match[1] or match[3]):
        raise _error(token, "a repetition is written {m}, {m,}, {,n} or {m,n}")
    least = int(match[1] or 0)
    most = int(match[3]) if match[3] else None if match[2] else least
    if max(least, most or 0) > MAX_REPEAT:
        raise _error(token, f"a repetition may have at most {MAX_REPEAT:,}")
    if most is not None and most < least:
        raise _error(token, "a repetition ends before it begins")
    return f"{{{least},{'' if most is None else most}}}"


def _error(token: Token, message: str) -> ValueError:
    return ValueError(f"line {token.line}: {message}")
