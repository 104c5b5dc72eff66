"""A model without a chat template: completions and tokens through the whole service, beside a node."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.deployment import Deployment
from tests.engines.tiny_chat import CONFIGS, save_model
from tests.stand_in_node import StandInNode

CATALOGUE = """
project = "Base"
[[models]]
name = "base"
tasks = ["completion"]
weights = "{weights}"
[models.engine]
torch_threads = 1
[models.defaults]
temperature = 0.0
[[models]]
name = "echo"
tasks = ["chat"]
weights = "echo:"
"""
PROMPT = "the quick brown"
REFUSAL = "model 'base' has no chat template, so it takes no messages; send a prompt to /v1/completions"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("base"), CONFIGS["llama"]())
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(scope="module")
def node() -> Iterator[StandInNode]:
    with StandInNode() as node:
        yield node


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, weights: Path, node: StandInNode
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("service")
    with Deployment(folder, catalogue=CATALOGUE.format(weights=weights), NODE_URL=node.url) as service:
        yield service.start("base", "echo")


@pytest.fixture(scope="module")
def client(service: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(weights: Path) -> Any:
    return AutoTokenizer.from_pretrained(weights)


@torch.inference_mode()
def test_it_continues_prompts_as_transformers_does(
    client: openai.OpenAI, weights: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    # the embedding has more rows than the tokenizer has tokens
    beyond = list(range(len(tokenizer), model.config.vocab_size))
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False, suppress_tokens=beyond)
    expected = tokenizer.decode(tokens[0, ids.shape[1] :])
    found = client.completions.create(model="base", prompt=PROMPT, max_tokens=12)
    assert expected and found.choices[0].text == expected
    chunks = client.completions.create(model="base", prompt=PROMPT, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected


@torch.inference_mode()
def test_it_scores_prompts(client: openai.OpenAI, weights: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT)["input_ids"]
    own = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    answer = client.completions.create(model="base", prompt=ids, echo=True, logprobs=0, max_tokens=0)
    scores = answer.choices[0].logprobs
    assert scores and scores.token_logprobs and scores.token_logprobs[0] is None
    expected = [float(own[place, token]) for place, token in enumerate(ids[1:])]
    assert scores.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)


def test_tokens_to_and_fro(service: Deployment, tokenizer: Any) -> None:
    status, found = service.post("/tokenize", {"model": "base", "prompt": PROMPT})
    assert (status, found["tokens"]) == (200, tokenizer(PROMPT)["input_ids"])
    status, text = service.post("/detokenize", {"model": "base", "tokens": found["tokens"]})
    assert (status, text["prompt"]) == (200, PROMPT)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_messages_are_refused_with_the_endpoint_that_serves_it(service: Deployment, path: str) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
    status, refused = service.post(path, body)
    assert (status, refused["error"]["message"], refused["error"]["param"]) == (400, REFUSAL, "model")


def test_the_service_says_what_it_serves(service: Deployment) -> None:
    status, row = service.get("/v1/models/base")
    assert status == 200
    assert (row["task"], row["url"]) == ("completion", f"{service.url}/v1/completions")
    assert row["endpoints"] == {"completion": row["url"]}
    assert (row["max_model_len"], row["input_modalities"]) == (1024, ["text"])


def test_it_is_not_registered_and_that_is_no_fault(service: Deployment, node: StandInNode) -> None:
    """The node would send chats to it."""
    # a worker begins to register before it is ready, so the one with a type tells that the other had its time
    node.wait_for(lambda node: node.entries("Base"), 30)
    assert {entry["model"] for entry in node.entries("Base")} == {"echo"}
    registered = {worker["model"]: worker["registered"] for worker in service.worker_rows()}
    assert registered["base"] is None
    status, ready = service.get("/readyz")
    assert status == 200 and not any("base" in warning for warning in ready["warnings"])
