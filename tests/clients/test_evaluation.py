"""lm-evaluation-harness on a small task: the likelihoods that it gets are those that transformers
computes."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.clients.conftest import set_up
from tests.deployment import ROOT, Deployment, demo_catalogue

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]

MODEL, WEIGHTS = "demo-chat", ROOT / "demo/models/chat"
QUESTIONS = [
    {"query": "Hello! How can I", "choices": [" help", " help you today?", " Paris"], "gold": 0},
    {
        "query": "<|user|>Hello!<|end|><|assistant|>",
        "choices": ["Hello! How can I help you today?", "no"],
        "gold": 0,
    },
    {"query": "Count to thirty.", "choices": [" one two", " 1, 2, 3", "\n"], "gold": 1},
]
TASK = """
task: likelihoods
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
"""


@torch.inference_mode()
def expected() -> list[tuple[float, bool]]:
    """For each choice its log likelihood after the question, and whether it is what greedy decoding would
    give."""
    tokenizer: Any = AutoTokenizer.from_pretrained(WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    found = []
    for question in QUESTIONS:
        start = len(tokenizer(question["query"])["input_ids"])
        for choice in question["choices"]:  # type: ignore[attr-defined]
            ids = tokenizer(question["query"] + choice)["input_ids"]
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)[start - 1 : -1]
            own = logprobs.gather(1, torch.tensor(ids[start:])[:, None])
            found.append((float(own.sum()), logprobs.argmax(-1).tolist() == ids[start:]))
    return found


def evaluate(service: Deployment, folder: Path, batch_size: int) -> list[tuple[float, bool]]:
    """Run the harness; return what it got for each choice."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "likelihoods.yaml").write_text(TASK.format(data=data))
    options = {
        "--model": "local-completions",
        "--model_args": f"model={MODEL},base_url={service.url}/v1/completions,tokenizer={WEIGHTS},"
        "tokenizer_backend=huggingface,max_length=1024",
        "--tasks": "likelihoods",
        "--include_path": str(folder),
        "--batch_size": str(batch_size),
        "--output_path": str(folder / f"out-{batch_size}"),
    }
    environment = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    environment |= {"HOME": str(folder), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [str(ROOT / ".venv-evaluation/bin/lm_eval"), "run", "--log_samples"]
    command += [part for option in options.items() for part in option]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (log,) = (folder / f"out-{batch_size}").rglob("samples_*.jsonl")
    samples = sorted(map(json.loads, log.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    pairs = [pair for sample in samples for (pair,) in sample["resps"]]
    return [(float(logprob), str(greedy) == "True") for logprob, greedy in pairs]


def test_the_harness_gets_the_likelihoods_of_transformers(tmp_path: Path) -> None:
    set_up("evaluation")
    with Deployment(tmp_path / "service", catalogue=demo_catalogue()) as service:
        service.start(MODEL)
        one, together = (evaluate(service, tmp_path, batch_size) for batch_size in (1, 8))
    reference = expected()
    for found in (one, together):
        assert [greedy for _, greedy in found] == [greedy for _, greedy in reference]
        assert [logprob for logprob, _ in found] == pytest.approx([each for each, _ in reference], abs=1e-3)
    assert {greedy for _, greedy in reference} == {True, False}
