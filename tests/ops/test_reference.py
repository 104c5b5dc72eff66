"""The settings' reference: every setting has its help, and what is printed and committed is made from it."""

import os
import subprocess
from pathlib import Path
from typing import Any

from catalogue import TASKS, ChatEngineOptions
from config import Settings
from supervise.reference import markdown, rows_of, settings_rows
from tests.deployment import ROOT


def test_the_page_is_what_the_generator_makes() -> None:
    """If this fails: python -m supervise.reference > docs/settings.md"""
    assert (ROOT / "docs/settings.md").read_text() == markdown()


def test_every_setting_and_every_key_of_the_catalogue_has_its_help() -> None:
    tables = [task.entry for task in TASKS.values()]
    inner: list[Any] = [
        kind.model_fields[name].annotation for kind in tables for name in ("engine", "defaults")
    ]
    rows = settings_rows() + [row for kind in tables for row in rows_of(kind, ("engine", "defaults"))]
    rows += [row for table in inner for row in rows_of(table)]
    assert [row.name for row in rows if not row.help] == []


def test_a_default_is_shown_as_the_operator_writes_it() -> None:
    shown = {row.name: row.default for row in settings_rows()}
    assert set(shown) == {name.upper() for name in Settings.model_fields}
    assert (shown["DRAIN_S"], shown["MODELS_FILE"], shown["API_KEYS"]) == ("60", "models.toml", "–")
    options = {row.name: row for row in rows_of(ChatEngineOptions)}
    assert (options["prefix_cache"].default, options["memory_fraction"].default) == ("true", "0.9")
    assert options["max_batch_size"].kind == "integer ≥ 1, ≤ 1024"


def test_help_prints_usage_and_settings_and_starts_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "run", "--help"],
        cwd=tmp_path,
        env={**os.environ, "DRAIN_S": "not read"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: scripts/run")
    for row in settings_rows():
        assert f"\n  {row.name}" in done.stdout
    assert "\n  BIND [127.0.0.1:1088]\n      host:port that the web process listens on" in done.stdout
