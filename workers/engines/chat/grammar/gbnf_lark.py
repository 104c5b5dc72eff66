"""Writes grammars in GBNF in the syntax of Lark.

A rule that refers to itself, directly or not, becomes a rule of Lark. Of everything else terminals are made,
as large as possible: they are automata, of which llguidance makes masks fast. A grammar without such rules is
a single one, and exact. Between terminals a text is taken to go on as long as it can (`_closed`): so less may
fit than the grammar allows, never more.
"""

from workers.engines.chat.grammar.gbnf import Node, read

NARROW = 16
"""A repetition of so many characters at most, as of spaces or digits, is written as a rule of Lark."""


def to_lark(text: str, max_rules: int) -> str:
    """Return a grammar of GBNF in the syntax of Lark. Raises ValueError, with a text that quotes nothing."""
    return _Writer(read(text, max_rules)).grammar()


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
        at = 0
        while at < len(parts):
            end = at
            while end < len(parts) and self._is_regular(parts[end]):
                end += 1
            # what is not closed at the end of the run stays apart
            last = max((place for place in range(at, end) if self._closed(parts[place])), default=-1)
            if last >= at:
                joined.append(parts[at] if last == at else Node("sequence", parts=parts[at : last + 1]))
                at = last + 1
            joined += parts[at : end + 1]
            at = end + 1
        return joined


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
