"""The reference of all settings, made from the help beside each default.

`python -m supervise.reference > docs/settings.md` writes the page. `scripts/run --help` prints the variables.
"""

import shutil
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from catalogue import TASKS, Catalogue, ModelEntry
from config import Settings

NONE = "–"
"""Shown for an empty default. Where another value is used then, the help names it."""

_INTRODUCTION = """\
# Settings

Made by `python -m supervise.reference > docs/settings.md` from `config.py` and `catalogue/`, where each
default has its help.

## Environment

Every process reads these variables when it starts; `scripts/run` passes its own environment on to the
processes that it starts. Other programs read theirs: `HF_TOKEN` and `HF_HOME` are the hub's. A – stands for
an empty default.
"""

_CATALOGUE = """\
## Catalogue

`MODELS_FILE` names a TOML file. An unknown key is an error. [models.example.toml](../models.example.toml) is
a catalogue of real models.
"""


class Row(NamedTuple):
    """One setting or key. `kind`: its type and bounds."""

    name: str
    kind: str
    default: str
    help: str


def settings_rows() -> list[Row]:
    """Return the environment variables, in the order of `Settings`."""
    return [row._replace(name=row.name.upper()) for row in rows_of(Settings)]


def rows_of(table: type[BaseModel], leave_out: tuple[str, ...] = ()) -> list[Row]:
    """Return the keys of a table, in the order of its class."""
    schemas = table.model_json_schema()["properties"]
    return [
        Row(name, _kind(schemas[name]), _default(field), field.description or "")
        for name, field in table.model_fields.items()
        if name not in leave_out
    ]


def help_text() -> str:
    """Return the environment variables as text for a terminal."""
    lines = ["environment variables (default in brackets; docs/settings.md has the catalogue's keys too):"]
    width = min(shutil.get_terminal_size().columns, 110)
    for row in settings_rows():
        default = "" if row.default == NONE else f" [{row.default}]"
        lines.append(f"  {row.name}{default}")
        lines += textwrap.wrap(row.help, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def markdown() -> str:
    """Return docs/settings.md."""
    return (
        "\n".join([_INTRODUCTION, *_table("variable", settings_rows()), "", _CATALOGUE, *_catalogue()]) + "\n"
    )


def _catalogue() -> Iterator[str]:
    yield from _table("key", rows_of(Catalogue, ("models",)))
    yield "\n### `[[models]]`: one for each model\n"
    yield from _table("key", rows_of(ModelEntry, ("engine", "defaults")))
    yield "\nTasks of the same kind of model can be combined. The kind decides on the keys of `engine` and `defaults`.\n"
    yield "| task | endpoint | deadline | kind of model |"
    yield "|---|---|---|---|"
    for task in TASKS.values():
        yield f"| `{task.name}` | `POST {task.path}` | `{task.deadline.upper()}` | {_first_line(task.entry)} |"
    for entry in dict.fromkeys(task.entry for task in TASKS.values()):
        for name in ("engine", "defaults"):
            table: Any = entry.model_fields[name].annotation
            yield f"\n### {_first_line(table).rstrip('.')}\n"
            yield from _table("key", rows_of(table))


def _table(first: str, rows: list[Row]) -> Iterator[str]:
    yield f"| {first} | value | default | meaning |"
    yield "|---|---|---|---|"
    for row in rows:
        default = row.default if row.default in (NONE, "required") else f"`{row.default}`"
        yield f"| `{row.name}` | {row.kind} | {default} | {row.help} |"


def _first_line(table: type) -> str:
    return (table.__doc__ or "").strip().splitlines()[0]


def _default(field: FieldInfo) -> str:
    value = field.default
    if field.is_required():
        return "required"
    if value in (None, "", (), PydanticUndefined):
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _kind(schema: dict[str, Any]) -> str:
    """Return the type and the bounds of a JSON schema in words."""
    schema = next((choice for choice in schema.get("anyOf", ()) if choice.get("type") != "null"), schema)
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = {"array": "list", "object": "table"}.get(schema["type"], schema["type"])
    bounds = [
        f"{sign} {schema[name]:g}"
        for name, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if name in schema
    ]
    return " ".join([kind, ", ".join(bounds)]).strip()


if __name__ == "__main__":
    print(markdown(), end="")
