"""What a machine can check of the documentation: links, paths, commands, the version, and the files for
GitHub."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from catalogue import Catalogue
from config import VERSION, Settings
from tests.deployment import ROOT

GENERATED = (".venv/", ".run/")
"""Beginnings of paths that are made at run time."""
INVENTED = {"own.py", "held.conf.py"}
"""Names of files that tests write."""


@cache
def tracked() -> frozenset[str]:
    """Return the files of the repository, new ones included."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return frozenset(name for name in listed.stdout.splitlines() if (ROOT / name).is_file())


def named(pattern: str) -> list[str]:
    return sorted(name for name in tracked() if re.search(pattern, name))


PAGES = named(r"\.md$")
TEXTS = named(r"\.(md|py|toml|ya?ml|txt|Dockerfile)$|^(scripts|\.ci)/")


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def exists(path: str) -> bool:
    """Whether a file or a folder of the repository has this path, or a path that ends so."""
    if path.endswith("/"):
        return any(f"/{path}" in f"/{name}" for name in tracked())
    return any(f"/{name}".endswith(f"/{path}") for name in tracked()) or exists(path + "/")


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_relative_links_lead_to_files_and_headings() -> None:
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            if "://" in link or (target.exists() and (not anchor or anchor in anchors(target))):
                continue
            broken.append(f"{page}: {link}")
    assert not broken


def test_lines_have_at_most_110_characters() -> None:
    """Except in code and tables, which can't be wrapped."""
    long = []
    for page in PAGES:
        is_code = False
        for number, line in enumerate(text_of(page).splitlines(), 1):
            is_code ^= line.startswith("```")
            if len(line) > 110 and not is_code and not line.startswith(("|", "![")):
                long.append(f"{page}:{number}")
    assert not long


def test_paths_in_backticks_exist() -> None:
    folders = {name.partition("/")[0] for name in tracked() if "/" in name}
    missing = []
    for page in PAGES:
        for quoted in re.findall(r"`([^`\n]+)`", text_of(page)):
            for word in quoted.split():
                is_path = re.fullmatch(r"[\w.-]+/[\w./-]*", word) and word.partition("/")[0] in folders
                if is_path and not exists(word):
                    missing.append(f"{page}: {word}")
    assert not missing


def test_python_files_that_are_named_exist() -> None:
    missing = []
    for name in TEXTS:
        for path in re.findall(r"(?<![\w.*/{}<-])[\w./-]*\w\.py\b(?![\w(-])", text_of(name)):
            if not path.startswith((*GENERATED, "/")) and path not in INVENTED and not exists(path):
                missing.append(f"{name}: {path}")
    assert not missing


def test_modules_that_are_run_exist() -> None:
    missing = [
        f"{name}: {module}"
        for name in TEXTS
        for module in re.findall(r"python3? -m ([\w.]+\w)", text_of(name))
        if find_spec(module) is None
    ]
    assert not missing


def templates(source: str) -> set[str]:
    """Return the texts in a Python file, with … for what is filled in."""
    fixed: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
            fixed.add("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            text = node.value.decode(errors="replace") if isinstance(node.value, bytes) else node.value
            fixed.add(re.sub(r"%[sdg]|\{\w+\}", "…", text))
    return fixed


def test_templates_of_messages() -> None:
    found = templates('f"{name}: {size:.1f} GiB" " free"; log.info("worker %s ends", 1); b"[DONE]"')
    assert {"…: … GiB free", "worker … ends", "[DONE]"} <= found


def test_messages_of_the_page_on_troubles_are_those_of_the_code() -> None:
    """What the first column of a table shows as code is printed by the service, word for word."""
    printing = re.compile(
        r"(app|node|workers|protocol|catalogue|supervise)/.*\.py$|[a-z]+\.py$|app/console/static/js/|scripts/(run|setup)$"
    )
    printed = {
        text
        for name in tracked()
        if printing.match(name)
        for text in (templates(text_of(name)) if name.endswith(".py") else {text_of(name)})
    }
    rows = re.findall(r"^\| (.+?) \|", text_of("docs/troubleshooting.md"), re.MULTILINE)
    quoted = {text for row in rows for text in re.findall(r"`([^`]+)`", row)}
    assert len(quoted) > 80, "the tables were not found"
    # the name of a variable comes before a message that another file makes
    alone = {name.upper() for name in Settings.model_fields} | {"length", "loading", "/readyz", "doctor"}
    missing = [text for text in quoted - alone if not any(text in message for message in printed)]
    assert not missing, sorted(missing)


def test_the_version_is_the_same_everywhere() -> None:
    released = re.findall(r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert VERSION == tomllib.loads(text_of("pyproject.toml"))["project"]["version"] == released[0]


def test_the_clients_that_are_named_are_those_that_are_tested() -> None:
    package = json.loads(text_of("tests/clients/node/package.json"))
    versions = {**package["dependencies"], **package["devDependencies"]}
    # the last one to name a package counts: another client may need an older one
    files = (
        "tests/clients/requirements-evaluation.txt",
        "tests/clients/requirements.txt",
        "requirements-dev.txt",
    )
    pins = "".join(map(text_of, files))
    python = dict(re.findall(r"^([\w-]+)==(\S+)$", pins, re.MULTILINE))
    tested = {
        "openai-python": python["openai"],
        "openai-node": versions["openai"],
        "Vercel AI SDK": versions["ai"],
        "langchain-openai": python["langchain-openai"],
        "LiteLLM": python["litellm"],
        "instructor": python["instructor"],
        "`llm`": python["llm"],
        "lm-evaluation-harness": python["lm_eval"],
    }
    table = text_of("docs/api.md").partition("\n## Clients\n")[2]
    assert dict(re.findall(r"^\| (\S.*?) ([\d.]+) \|", table, re.MULTILINE)) == tested
    assert f"`@ai-sdk/openai-compatible` {versions['@ai-sdk/openai-compatible']}" in table


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        (".github/workflows/ci.yml", "github-workflows"),
        (".github/ISSUE_TEMPLATE/config.yml", "github-issue-config"),
        (".github/ISSUE_TEMPLATE/bug.yml", "github-issue-forms"),
        (".github/ISSUE_TEMPLATE/feature.yml", "github-issue-forms"),
    ],
)
def test_files_for_github_are_valid(name: str, schema: str) -> None:
    check = Path(sys.executable).with_name("check-jsonschema")
    done = subprocess.run(
        [check, "--builtin-schema", f"vendor.{schema}", ROOT / name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


CATALOGUES = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"^```toml\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)
    )
    if "[[models]]" in block
]


@pytest.mark.parametrize("block", CATALOGUES)
def test_catalogues_in_the_pages_are_valid(block: str, tmp_path: Path) -> None:
    project = "" if "project =" in block else 'project = "DecentralGPT"\n'
    (tmp_path / "models.toml").write_text(project + block)
    assert Catalogue.from_file(tmp_path / "models.toml").models
