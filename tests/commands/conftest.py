"""Runs the commands of `flask --app wsgi` as an operator does, in a process of their own."""

import json
import subprocess
import sys
from typing import Any

from tests.deployment import ROOT, Deployment


def flask(service: Deployment, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command against a deployment; return when it has ended."""
    return subprocess.run(
        [sys.executable, "-m", "flask", "--app", "wsgi", *words],
        cwd=ROOT,
        env=service.environment(**environment),
        capture_output=True,
        text=True,
        timeout=340,
        check=False,
    )


def succeeds(service: Deployment, *words: str, **environment: str) -> str:
    """Run a command that must succeed; return what it printed."""
    done = flask(service, *words, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def table(printed: str) -> list[dict[str, str]]:
    """The rows of a printed table, by the head of each column."""
    head, *rows = printed.splitlines()
    starts = [head.index(name) for name in head.split()]
    cuts = list(zip(starts, [*starts[1:], None], strict=True))
    return [{head[a:b].strip(): row[a:b].strip() for a, b in cuts} for row in rows]


def parsed(printed: str) -> Any:
    """What a command printed with --json."""
    return json.loads(printed)
