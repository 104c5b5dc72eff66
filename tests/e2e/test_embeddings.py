"""POST /v1/embeddings with all-MiniLM-L6-v2, a trained model, and the unmodified OpenAI client."""

import http.client
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.deployment import Deployment, wait_until
from tests.stand_in_node import StandInNode

pytestmark = pytest.mark.slow

MODEL = "minilm"
CATALOGUE = """
project = "Embeddings"
[[models]]
name = "minilm"
tasks = ["embedding"]
weights = "{weights}"
[models.engine]
torch_threads = 1
[[models]]
name = "echo"
tasks = ["chat"]
weights = "echo:"
"""
TEXTS = ["How do I bake bread?", "Instructions for making a loaf", "The king abdicated in 1936"]


@pytest.fixture(scope="module")
def node() -> Iterator[StandInNode]:
    with StandInNode() as node:
        yield node


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, minilm: Path, node: StandInNode
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("embeddings")
    with Deployment(folder, catalogue=CATALOGUE.format(weights=minilm), NODE_URL=node.url) as service:
        yield service.start(MODEL, "echo")


@pytest.fixture(scope="module")
def client(service: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def similarity(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def test_the_client_gets_vectors_by_its_default_which_is_base64(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input=TEXTS)
    question, near, far = (item.embedding for item in answer.data)
    assert similarity(question, near) > 0.5 > 0.3 > similarity(question, far)
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert {len(item.embedding) for item in answer.data} == {384}
    assert math.isclose(similarity(far, far), 1, abs_tol=1e-5)
    assert answer.model == MODEL and answer.object == "list"
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 24
    assert answer.to_dict()["code"] == 0


def test_numbers_are_those_of_base64(client: openai.OpenAI) -> None:
    coded = client.embeddings.create(model=MODEL, input=TEXTS[0]).data[0].embedding
    plain = client.embeddings.create(model=MODEL, input=TEXTS[0], encoding_format="float").data[0].embedding
    assert plain == pytest.approx(coded, abs=1e-7)


def test_tokens_are_the_text_that_they_make(client: openai.OpenAI) -> None:
    # [CLS] hello world [SEP]
    tokens = [101, 7592, 2088, 102]
    text, same, other = (
        client.embeddings.create(model=MODEL, input=given).data[0].embedding
        for given in ("hello world", tokens, [tokens[:3]])
    )
    assert same == pytest.approx(text, abs=1e-5)
    assert similarity(other, text) < 0.999


def test_many_requests_at_once_get_the_vectors_of_one(client: openai.OpenAI) -> None:
    texts = [f"{text} ({number})" for number in range(40) for text in TEXTS]
    together = [item.embedding for item in client.embeddings.create(model=MODEL, input=texts).data]

    def ask(text: str) -> list[float]:
        return client.embeddings.create(model=MODEL, input=text).data[0].embedding

    with ThreadPoolExecutor(30) as pool:
        alone = list(pool.map(ask, texts))
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_as_many_inputs_as_openai_allows(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input=["a", "b"] * 1024)
    assert len(answer.data) == 2048
    assert answer.data[2047].embedding == pytest.approx(answer.data[1].embedding, abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "status", "code", "words"),
    [
        ({"input": "word " * 300}, 400, "context_length_exceeded", "maximum context length is 256 tokens"),
        ({"input": ["a", "word " * 200_000]}, 400, "context_length_exceeded", "input 1 has at least"),
        ({"input": ""}, 400, "invalid_request", "at least 1 characters"),
        ({"input": ["a"] * 2049}, 400, "invalid_request", "at most 2048 items"),
        ({"input": [[30522]]}, 400, "invalid_request", "the model's tokens are 0 to 30521"),
        ({"input": "a\0"}, 400, "invalid_request", "NUL"),
        ({"input": "a", "dimensions": 100}, 400, "unsupported_parameter", "no Matryoshka model"),
        (
            {"input": "a", "truncate_prompt_tokens": 300},
            400,
            "invalid_request",
            "at most 256, this model's limit",
        ),
        ({"input": "a", "model": "echo"}, 400, "invalid_request", "does not support 'embedding'"),
        ({"input": "a", "model": "other"}, 404, "model_not_found", "this endpoint serves: minilm"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_can_not_be_served_is_refused(
    service: Deployment, fields: dict[str, Any], status: int, code: str, words: str
) -> None:
    found, body = service.post("/v1/embeddings", {"model": MODEL, **fields})
    assert (found, body["error"]["code"]) == (status, code)
    assert words in body["message"]


def test_lone_surrogates_are_refused(service: Deployment) -> None:
    status, body = service.post("/v1/embeddings", b'{"model": "minilm", "input": "\\ud800"}')
    assert (status, body["error"]["code"]) == (400, "invalid_request")


def test_a_chat_of_the_model_is_refused(service: Deployment) -> None:
    status, body = service.chat("Hi", MODEL)
    assert status == 400 and "it supports: embedding" in body["message"]


def test_long_inputs_are_cut_if_the_request_says_so(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(
        model=MODEL, input="word " * 300, extra_body={"truncate_prompt_tokens": -1, "mood": "good"}
    )
    assert answer.usage.prompt_tokens == 256


def test_times_and_ignored_fields_are_in_the_headers(service: Deployment) -> None:
    data = json.dumps({"model": MODEL, "input": "a", "mood": "good"}).encode()
    response, connection = service.request(
        "POST", "/v1/embeddings", data, {"Content-Type": "application/json"}
    )
    with closing(connection):
        assert json.loads(response.read())["code"] == 0
        assert response.headers["X-Ignored-Params"] == "mood"
        assert int(response.headers["X-Total-Ms"]) >= int(response.headers["X-Queued-Ms"]) >= 0
        assert "X-First-Token-Ms" not in response.headers


def test_the_model_and_its_worker_are_listed_and_the_node_does_not_know_them(
    service: Deployment, node: StandInNode
) -> None:
    row = next(row for row in service.get("/v1/models")[1]["data"] if row["id"] == MODEL)
    assert row["task"] == "embedding" and row["max_model_len"] == 256
    assert row["endpoints"] == {"embedding": f"{service.url}/v1/embeddings"} and row["url"].endswith(
        "/v1/embeddings"
    )
    # the chat worker, which started later, is registered
    node.wait_for(lambda node: node.cids("Embeddings"), 30)
    assert [entry["model"] for entry in node.entries("Embeddings")] == ["echo"]
    workers = {worker["model"]: worker for worker in service.worker_rows()}
    assert workers[MODEL]["registered"] is None and workers["echo"]["registered"] is True
    assert workers[MODEL]["last_error"] == ""


def test_a_client_that_leaves_stops_its_request(service: Deployment) -> None:
    data = json.dumps({"model": MODEL, "input": ["word " * 250] * 1000}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", service.port)
    connection.request("POST", "/v1/embeddings", data, {"Content-Type": "application/json"})
    wait_until(lambda: running(service) == 1, timeout_s=60, what="the request runs")
    connection.close()
    wait_until(lambda: running(service) == 0, timeout_s=60, what="the request has ended")
    log = service.workers[f"{MODEL}-1"].log
    ended = "task=embedding outcome=cancelled"
    wait_until(lambda: ended in log.read_text(), timeout_s=60, what="the worker logs the job")
    assert "inputs=1000" in log.read_text() and "word" not in log.read_text()


def running(service: Deployment) -> int:
    return next(int(row["running"]) for row in service.worker_rows() if row["model"] == MODEL)
