"""tests/mutants.toml: each mutant still has a place in the code, and tests that could notice it."""

from collections import Counter

import pytest

from tests.mutants import ROOT, Mutant, read_table

TABLE = read_table()


@pytest.mark.parametrize("mutant", TABLE, ids=lambda mutant: mutant.name)
def test_each_mutant_changes_one_place_and_names_tests(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, f"{mutant.file} must have this text once: {mutant.old!r}"
    assert mutant.new != mutant.old
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    assert mutant.tests
    for test in mutant.tests:
        assert (ROOT / test.partition("::")[0]).is_file(), test


def test_names_are_unique() -> None:
    """Names choose the mutants of a run."""
    assert max(Counter(mutant.name for mutant in TABLE).values()) == 1
