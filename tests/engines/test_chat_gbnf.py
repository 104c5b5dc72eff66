"""Grammars in GBNF, llama.cpp's notation: what they allow, what models write by them, what is refused."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from protocol.events import Finished
from tests.engines.test_chat_grammar import accepts, compiled, refusal
from tests.engines.test_chat_structured import closing, format_job
from tests.engines.tiny_chat import CONFIGS, make_engine, run, save_model
from workers.engines.chat.grammar.gbnf import MAX_DEPTH, MAX_REPEATS, is_gbnf

JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::= "[" ws ( value ("," ws value)* )? "]" ws

string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]{0,5})) ("." [0-9]{1,4})? ([eE] [-+]? [0-9])? ws

# a few spaces, or none
ws ::= | " " | "\n" [ \t]{0,3}
"""
ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n"){1,3}
expr  ::= term ([-+*/] ws term){0,4}
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
LIST = 'root ::= item+\nitem ::= "- " [^\\r\\n\\x0b\\x0c\\x85\\u2028\\u2029]{1,9} "\\n"'
CHESS = """root ::= "1. " move " " move "\\n" ([1-9] ". " move " " move "\\n")+
move ::= (pawn | nonpawn | castle) [+#]?

# piece type, optional file or rank, optional capture, destination
nonpawn ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
pawn ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?
castle ::= "O-O" "-O"?"""
SQL = """
    root ::= select_statement

    select_statement ::= "SELECT " column " from " table " where " condition

    column ::= "col_1 " | "col_2 "
    table ::= "table_1 " | "table_2 "
    condition ::= column "= " number
    number ::= "1 " | "2 "
"""
LISP = 'root ::= "(" (root | [a-z]{1,3}) (" " (root | [a-z]{1,3})){0,2} ")"'
LEFT = 'root ::= sum\nsum ::= sum "+" [1-9] | [1-9]'


def is_equations(text: str) -> bool:
    """Whether a text is of ARITHMETIC: terms are replaced by x until nothing but x is left."""
    text = re.sub(r"[a-z][a-z0-9_]*|[0-9]+", "x", text)
    # only blanks before an operator or behind it: ARITHMETIC allows none between two names
    while (shorter := re.sub(r"\(\s*x\s*([-+*/]\s*x\s*){0,4}\)", "x", text)) != text:
        text = shorter
    return re.fullmatch(r"(x\s*([-+*/]\s*x\s*){0,4}=\s*x\s*\n){1,3}", text) is not None


def is_lisp(text: str) -> bool:
    atom = "[a-z]{1,3}"
    while (shorter := re.sub(rf"\({atom}( {atom}){{0,2}}\)", "x", text)) != text:
        text = shorter
    return text == "x"


def is_json_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)


def matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


MOVE = r"([NBKQR][a-h]?[1-8]?x?[a-h][1-8]|([a-h]x)?[a-h][1-8](=[NBKQR])?|O-O(-O)?)[+#]?"
GRAMMARS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "json": (JSON, is_json_object),
    "arithmetic": (ARITHMETIC, is_equations),
    "list": (LIST, matches(r"(- [^\n\r]{1,9}\n)+")),
    "chess": (CHESS, matches(rf"1\. {MOVE} {MOVE}\n([1-9]\. {MOVE} {MOVE}\n)+")),
    "sql": (SQL, matches("SELECT col_[12]  from table_[12]  where col_[12] = [12] ")),
    "lisp": (LISP, is_lisp),
    "left recursion": (LEFT, matches(r"[1-9](\+[1-9])*")),
}
FIT = {
    "json": ["{}", '{"a": [1, -2.5e+3, "x\\n", {"b": null}], "":true}'],
    "arithmetic": ["a=b\n", "a+b*(2 -c)=7\n", "x1= 2\ny=3\n\n"],
    "list": ["- a\n", "- red\n- two words\n"],
    "chess": ["1. e4 e5\n2. Nf3 Nc6\n3. O-O-O exd8=Q#\n"],
    "sql": ["SELECT col_1  from table_2  where col_2 = 1 "],
    "lisp": ["(a)", "(a (b c) d)", "((ab) ((x)))"],
    "left recursion": ["1", "1+2+3"],
}
UNFIT = {
    "json": ["[]", '{"a":01}', '{"a":1,}', '{"a":"\n"}'],
    "arithmetic": ["a=\n", "=1\n", "(a=b\n", "a b=c\n", "a=b"],
    "list": ["a\n", "- \n", "- a", "- a\nb\n"],
    "chess": ["1. e4 e5\n", "2. e4 e5\n2. e4 e5\n", "1. e9 e5\n2. e4 e5\n"],
    "sql": ["SELECT col_3  from table_2  where col_2 = 1 "],
    "lisp": ["a", "(a", "(a b c d)", "()"],
    "left recursion": ["", "1+", "+1", "0"],
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_texts_fit_as_the_grammar_says(name):
    text, judge = GRAMMARS[name]
    grammar = compiled("grammar", text)
    assert [accepts(grammar, one) for one in FIT[name]] == [True] * len(FIT[name])
    assert [accepts(grammar, one) for one in UNFIT[name]] == [False] * len(UNFIT[name])
    assert all(judge(one) for one in FIT[name])


def test_what_models_write_fits(tmp_path):
    """At a high temperature; judged by JSON's parser, and by regular expressions that fold parentheses."""
    engine, collector = make_engine(save_model(tmp_path, CONFIGS["llama"]()), max_batch_size=64)
    try:
        # random models seldom end what they may go on with
        bias = closing(engine)
        vocabulary = engine.parts.prompts.vocabulary
        bias |= {
            token: 4.0 for token in vocabulary.pieces if vocabulary.token_bytes(token) in (b")", b"=", b"\n")
        }
        bias[0] = 3.0
        jobs = {
            f"{name} {seed}": format_job(
                f"{name} {seed}", "grammar", text, seed=seed, max_tokens=200, logit_bias=bias
            )
            for name, (text, _) in GRAMMARS.items()
            for seed in range(8)
        }
        results = run(engine, collector, list(jobs.values()))
        ended: dict[str, int] = {}
        for job, result in zip(jobs, results, strict=True):
            name = job[:-2]
            assert isinstance(result.events[-1], Finished), (job, result.events[-1])
            if result.finish()[0] == "stop":
                assert GRAMMARS[name][1](result.text()), (name, result.text())
                ended[name] = ended.get(name, 0) + 1
        assert ended.keys() == GRAMMARS.keys() and sum(ended.values()) > 4 * len(GRAMMARS), ended
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("text", "fits", "others"),
    [
        ('root ::= [a-z]* "b"', ["b", "aab", "bbb"], ["", "a", "aabc"]),
        ('root ::= ("<" | "<=") "="', ["<=", "<=="], ["<", "="]),
        ('root ::= "é\\u00e9\\xe9\\U0001F600" . [^x-z\\]-]', ["ééé😀\nw", "ééé😀😀a"], ["ééé😀ax", "ééé😀a]"]),
        ('root ::= "\\"\\\\\\n\\t/" [\\[\\]\\\\"/^-]', ['"\\\n\t/]', '"\\\n\t/-'], ['"\\\n\t/a']),
        ('root ::= "a"{2} "b"{1,} "c"{,2} "d"{1,2}', ["aabd", "aabbbccdd"], ["abd", "aad", "aabcccd"]),
        ('root ::= ""', [""], ["a"]),
        ('root ::= a\n | "b" # or\n  | "c"\na ::=\n  "d"', ["b", "c", "d"], ["a"]),
        ('# first\n\n  root::="a"|a_B-1 a_B-1::="b"', ["a", "b"], ["ab"]),
        ('unused ::= "x" unused | "y"\nroot ::= "a"', ["a"], ["y"]),
    ],
)  # fmt: skip
def test_the_notation(text, fits, others):
    grammar = compiled("grammar", text)
    assert [accepts(grammar, one) for one in fits] == [True] * len(fits)
    assert [accepts(grammar, one) for one in others] == [False] * len(others)


def test_a_grammar_is_gbnf_if_it_begins_with_such_a_rule():
    assert is_gbnf("# c\n root-1 ::= x") and not is_gbnf('start: "::="') and not is_gbnf("")
    assert accepts(compiled("grammar", 'start: "a ::= b"'), "a ::= b")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('Sesame ::= "a"', "rule root"),
        ("root ::= Sesame", "line 1: this rule is not defined"),
        ('root ::= "a"\n\n"Sesame', "line 3: this is not a part of GBNF"),
        ('root ::= "Sesame" <[17]>', "not a part of GBNF"),
        ('root ::= (="Sesame")', "not a part of GBNF"),
        ('root ::= ("Sesame"', "line 1: a parenthesis is not closed"),
        ('root ::= "Sesame")', "not opened"),
        ('root ::= "a"\nroot ::= "Sesame"', "line 2: a rule of this name"),
        ('root ::= * "Sesame"', "nothing that can be repeated"),
        ('root ::= "Sesame"+*', "nothing that can be repeated"),
        ('root ::= "Sesame"{10001}', "at most 10,000"),
        ('root ::= "Sesame"{99999999999999999999}', "is written"),
        ('root ::= "Sesame"{2,1}', "ends before it begins"),
        ('root ::= "Sesame"{}', "is written"),
        ('root ::= "Sesame\\d"', "escape is not supported"),
        ('root ::= "Sesame\\uD800"', "not a character"),
        ('root ::= "Sesame\\U00110000"', "not a character"),
        ('root ::= "Sesame" []', "without characters"),
        ('root ::= "Sesame" [z-a]', "ends before it begins"),
        ("root ::= root", "no text would fit it"),
        ('root ::= root "Sesame"', "no text would fit it"),
    ],
)
def test_a_mistake_is_named_and_not_quoted(text, words):
    message = refusal("grammar", text)
    assert words in message and "sesame" not in message.lower()


HOSTILE = {
    "rules": "root ::= r0\n" + "\n".join(f'r{at} ::= "a{at}"' for at in range(3000)),
    "recursive rules": "root ::= r0\n"
    + "\n".join(f'r{at} ::= "a{at}" | "(" r{at * 7 % 900} ")" r{(at + 1) % 900}' for at in range(900)),
    "alternatives that recur": "root ::= " + " | ".join(f'"x{at}" root' for at in range(4000)),
    "depth": "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000,
    "open parentheses": "root ::= " + "(" * 60_000,
    "repetition signs": 'root ::= "a"' + "+" * 60_000,
    "optional parts": "root ::= " + '"a"? ' * 10_000,
    "any text, often": "root ::= " + ".* " * 10_000,
    "optional recursion": "root ::= " + '("a" root)? ' * 4000,
    "doubling rules": "root ::= r0\n"
    + "\n".join(f"r{at} ::= r{at + 1} r{at + 1}" for at in range(40))
    + '\nr40 ::= "a"',
    "a huge repetition": 'root ::= "a"{1000000000}',
    "comments": "#" * 30_000 + "\n" * 30_000,
    "a circle": "root ::= a\na ::= b\nb ::= a",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_take_too_long_is_refused_at_once(name):
    assert "too long" not in refusal("grammar", HOSTILE[name][: 64 * 1024])


LARGE = {
    "words": "root ::= " + " | ".join(f'"word{at}"' for at in range(4000)),
    "rules": "root ::= r0\n" + "\n".join(f'r{at} ::= "a" r{at + 1}' for at in range(400)) + '\nr400 ::= "b"',
    "repetitions": 'root ::= "a"{10000} [a-z]{1,10000}',
    "repeated repetitions": "root ::= " + "(" * MAX_DEPTH + '"a"' + "){1,10000}" * MAX_DEPTH,
    "depth": "root ::= " + "(" * MAX_DEPTH + '"a"' + ")*" * MAX_DEPTH,
    "optional parts": "root ::= " + '"a"? ' * MAX_REPEATS,
    "characters": "root ::= [" + "".join(chr(0x4E00 + 2 * at) for at in range(9000)) + "]+",
    "texts side by side": "root ::= " + '"a" ' * 2000 + 'root? "b"*',
    "ambiguous": 'root ::= root root | "a"',
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_within_the_bounds_compiles(name):
    compiled("grammar", LARGE[name])


def test_a_grammar_with_too_many_readings_ends_its_request_and_no_other(tmp_path):
    engine, collector = make_engine(save_model(tmp_path, CONFIGS["llama"]()))
    try:
        sampling: dict[str, Any] = {"max_tokens": 900, "logit_bias": {0: -100.0}}
        failed, list_ = run(
            engine,
            collector,
            [
                format_job("bad", "grammar", LARGE["ambiguous"], **sampling),
                format_job("good", "grammar", CHESS, seed=2),
            ],
        )
        assert failed.failed.code == "invalid_request" and "too complex" in failed.failed.message
        assert list_.finish()[0] in ("stop", "length") and list_.text().startswith("1. ")
    finally:
        engine.close()
