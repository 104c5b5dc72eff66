"""What each module may load, checked in fresh processes, where imports of third-party packages show too."""

import os
import subprocess
import sys

import pytest

from tests.deployment import ROOT


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("wsgi", ["torch", "transformers", "diffusers", "accelerate", "workers"]),
        ("gunicorn_worker", ["flask", "app", "catalogue", "protocol", "celery", "redis"]),
        ("workers", ["flask", "torch", "app"]),
        (
            "workers.celery",
            ["flask", "werkzeug", "gunicorn", "torch", "transformers", "diffusers", "app", "pynvml"],
        ),
        ("workers.engines", ["torch", "celery", "redis", "flask"]),
        ("node.client", ["flask", "torch", "celery", "app", "workers"]),
        ("node.registrar", ["flask", "torch", "celery", "app", "workers"]),
        ("protocol.queue", ["flask", "torch", "app", "workers"]),
        ("catalogue", ["celery", "redis", "flask", "torch", "app", "workers", "node", "protocol"]),
        ("logs", ["config", "flask", "celery", "gunicorn", "gevent", "app", "workers", "protocol"]),
        ("config", ["celery", "redis", "flask", "torch", "app", "workers", "node", "protocol", "catalogue"]),
    ],
)
def test_a_fresh_import_loads_none_of(module: str, forbidden: list[str]) -> None:
    code = f"import {module}, sys; print(*[name for name in {forbidden!r} if name in sys.modules])"
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert answer.stdout.split() == []
