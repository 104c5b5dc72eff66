"""Simon Willison's `llm`, as a command: prompts, streams, conversations, schemas, tools, errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODELS = """
- model_id: {id}
  model_name: {name}
  api_base: {url}
  api_key_name: service
  supports_schema: true
  supports_tools: true
"""
ADD = """
def add(a: int, b: int) -> int:
    "Add two numbers."
    return a + b
"""


@pytest.fixture(scope="session")
def folder(service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user writes to configure the command."""
    folder = tmp_path_factory.mktemp("llm")
    models = [("scripted", "scripted", service.url), ("missing", "gpt-9", service.url)]
    models += [("echo", "echo", service.url)]
    models += [("limited", "scripted", service.limited_url)]
    text = "".join(MODELS.format(id=name, name=model, url=url) for name, model, url in models)
    (folder / "extra-openai-models.yaml").write_text(text)
    (folder / "keys.json").write_text(json.dumps({"service": service.key}))
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("llm")), *arguments]
    environment = {**os.environ, "LLM_USER_PATH": str(folder)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def said(folder: Path, *arguments: str) -> str:
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("options", [[], ["--no-stream"]])
def test_prompt(folder, options):
    assert said(folder, "-m", "scripted", "Hello!", *options) == "Hello! How can I help you?"


def test_conversation(folder):
    said(folder, "-m", "scripted", "Hello!")
    assert said(folder, "-c", "Count to twelve.").endswith("eleven, twelve.")
    assert json.loads(said(folder, "logs", "--json", "-n", "1"))[0]["output_tokens"] > 3


@pytest.mark.parametrize("options", [[], ["--no-stream"]])
def test_schema(folder, options):
    schema = {"properties": {"colour": {"enum": ["red"]}}, "required": ["colour"]}
    text = json.dumps({"type": "object", "additionalProperties": False, **schema})
    answer = said(folder, "-m", "scripted", "--schema", text, "Where is the ball?", *options)
    assert json.loads(answer) == {"colour": "red"}


@pytest.mark.parametrize("options", [[], ["--no-stream"]])
def test_tools(folder, options):
    answer = said(folder, "-m", "scripted", "--functions", ADD, "What is 3 + 4?", *options)
    assert answer == "3 + 4 is 7."


def test_two_calls_at_once(folder):
    answer = said(folder, "-m", "scripted", "--functions", ADD, "What are 2 + 2 and 5 + 6?")
    assert answer.startswith("I add twice.") and answer.endswith("They are 4 and 11.")


@pytest.mark.parametrize(
    ("model", "prompt", "words"),
    [
        ("echo", "raise after three tokens", "failed on this request"),
        ("missing", "Hello!", "gpt-9"),
        ("scripted", "word " * 2000, "maximum context length is 4096 tokens"),
    ],
)
def test_errors(folder, model, prompt, words):
    done = run(folder, "-m", model, prompt)
    assert done.returncode == 1 and words in done.stderr
    assert "Traceback" not in done.stderr
