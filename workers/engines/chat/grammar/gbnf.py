"""Reads grammars in GBNF, the notation of llama.cpp, and writes them in the syntax of Lark.

A rule that refers to itself, directly or not, becomes a rule of Lark. Of everything else terminals are made,
as large as possible: they are automata, of which llguidance makes masks fast. A grammar without such rules is
a single one, and exact. Between terminals a text is taken to go on as long as it can (`_closed`): so less may
fit than the grammar allows, never more.
"""

import re
from typing import NamedTuple

MAX_DEPTH = 20
"""Parentheses within parentheses."""

NARROW = 16
"""A repetition of so many characters at most, as of spaces or digits, is written as a rule of Lark."""

ANY = 0x110000
"""Number of characters."""

MAX_REPEATS = 1000
"""Repetitions in a grammar: *, +, ? and braces."""

MAX_REPEAT = 10_000
"""A number in braces."""

_FIRST_RULE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*[\w-]+[ \t\r\n]*::=")

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


def to_lark(text: str, max_rules: int) -> str:
    """Return a grammar of GBNF in the syntax of Lark. Raises ValueError, with a text that quotes nothing."""
    return _Writer(_Reader(text, max_rules).rules()).grammar()


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


class _Writer:
    """Writes parsed rules in the syntax of Lark, with names of its own.

    T… and P… are terminals, r… are rules.
    """

    def __init__(self, rules: dict[str, Node]) -> None:
        self._rules = rules
        self._numbers = {name: number for number, name in enumerate(rules)}
        self._regular: dict[str, bool] = {}
        """The rules that refer to no recursive rule, and whether they are `_closed`."""
        self._widths: dict[str, int] = {}
        for name in _regular(rules):
            self._widths[name] = self._width(rules[name])
            self._regular[name] = self._closed(rules[name])
        self._terminals: dict[str, str] = {}
        """Parts of rules that are terminals, and their names."""
        self._wanted: dict[str, str] = {}
        """The names in Lark that are used, and the rules that they stand for."""

    def grammar(self) -> str:
        start = self._name("T" if "root" in self._regular else "r", "root")
        lines = [f"start: {start}"]
        written: set[str] = set()
        while names := self._wanted.keys() - written:
            for name in sorted(names):
                node = self._rules[self._wanted[name]]
                lines.append(f"{name}: {self._terminal(node) if name[0] == 'T' else self._rule(node)}")
            written |= names
        lines += [f"{name}: {body}" for body, name in self._terminals.items()]
        return "\n".join(lines)

    def _name(self, kind: str, rule: str) -> str:
        name = f"{kind}{self._numbers[rule]}"
        self._wanted[name] = rule
        return name

    def _closed(self, node: Node) -> bool:
        """Whether a text that fits wholly is taken not to go on, or may be taken as long as possible.

        A terminal is greedy: behind `[ \\n]*` no other line break would fit. As a rule of Lark such a
        repetition takes what is right, at the cost of an item of the parser for each of its characters; that
        is too much for letters, and what is made of these, as names, is meant to be as long as possible.
        """
        match node.kind:
            case "regex":
                return node.text != '""'
            case "rule":
                return self._regular.get(node.text, False)
            case "choice":
                return all(self._closed(part) for part in node.parts)
            case "sequence":
                return bool(node.parts) and self._closed(node.parts[-1])
            case "repeat":
                least, _, most = node.text.strip("{}").partition(",")
                fixed = least == most and least != "0" and self._closed(node.parts[0])
                return fixed or self._width(node) > NARROW
        return False

    def _width(self, node: Node) -> int:
        """How many characters it is made of, about."""
        if node.kind == "regex":
            return node.size
        if node.kind == "rule":
            return self._widths.get(node.text, 0)
        return sum(self._width(part) for part in node.parts)

    def _terminal(self, node: Node) -> str:
        """Write what refers to no recursive rule as a part of a terminal."""
        if node.kind == "regex":
            return node.text
        if node.kind == "rule":
            return self._name("T", node.text)
        parts = [self._terminal(part) for part in node.parts]
        if node.kind == "repeat":
            return f"({parts[0]}){node.text}"
        return f"({(' | ' if node.kind == 'choice' else ' ').join(parts)})" if parts else '""'

    def _rule(self, node: Node) -> str:
        """Write a part of a rule: with terminals as large as possible that end in something definite."""
        if node.kind == "regex" and node.text == '""':
            return node.text
        if self._closed(node) and self._is_regular(node):
            return self._terminals.setdefault(self._terminal(node), f"P{len(self._terminals)}")
        if node.kind == "rule":
            return self._name("r", node.text)
        if node.kind == "repeat":
            return f"({self._rule(node.parts[0])}){node.text}"
        if node.kind == "choice":
            return f"({' | '.join(self._rule(part) for part in node.parts)})"
        return f"({' '.join(self._rule(part) for part in self._joined(node.parts))})" if node.parts else '""'

    def _is_regular(self, node: Node) -> bool:
        return all(reference.text in self._regular for reference in node.references())

    def _joined(self, parts: tuple[Node, ...]) -> list[Node]:
        """Join what stands side by side in a sequence and is one terminal together."""
        joined: list[Node] = []
        run: list[Node] = []
        for part in parts:
            if not self._is_regular(part):
                joined += [*run, part]
                run = []
                continue
            run.append(part)
            if self._closed(part):
                joined.append(run[0] if len(run) == 1 else Node("sequence", parts=tuple(run)))
                run = []
        # two closed parts side by side are one, too
        return _merged(self, [*joined, *run])


def _merged(writer: _Writer, parts: list[Node]) -> list[Node]:
    merged: list[Node] = []
    for part in parts:
        if merged and all(writer._closed(one) and writer._is_regular(one) for one in (merged[-1], part)):
            merged[-1] = Node("sequence", parts=(merged[-1], part))
        else:
            merged.append(part)
    return merged


def _regular(rules: dict[str, Node]) -> list[str]:
    """The names of the rules that refer to no recursive rule, each after those that it refers to."""
    users: dict[str, list[str]] = {name: [] for name in rules}
    missing = {}
    for name, node in rules.items():
        used = {reference.text for reference in node.references()}
        missing[name] = len(used)
        for other in used:
            users[other].append(name)
    regular = [name for name, count in missing.items() if count == 0]
    for name in regular:
        for user in users[name]:
            missing[user] -= 1
            if missing[user] == 0:
                regular.append(user)
    return regular


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
