"""Random requests, from /openapi.json and by hand: only declared responses, no 5xx except a declared 503.

2,000 cases; `FUZZ_CASES=20000 .venv/bin/python -m pytest tests/security/test_fuzz.py` runs more.
"""

import base64
import http.client
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.openapi.checks import RejectedPositiveData

from protocol.names import Keys
from tests.deployment import Deployment
from tests.security.conftest import HI, Answer, check_error_body

CASES = int(os.environ.get("FUZZ_CASES", "2000"))
GUIDED = CASES // 4

FORMATS = {"response_format", "structured_outputs", "guided_json", "guided_regex"}
FORMATS |= {"guided_choice", "guided_grammar"}
"""Of these a request may have one."""

OF_IMAGES = {"n", "step", "steps", "num_inference_steps", "width", "height", "size"}
SEMANTIC = {
    # Fields with rules that JSON Schema cannot express: another field or the model limits them.
    "/v1/chat/completions": {
        "min_tokens",
        "top_logprobs",
        "continue_final_message",
        "tool_choice",
        "tool_choice.function.name",
    }
    | FORMATS,
    "/v1/completions": {"min_tokens", "best_of", "n"} | FORMATS,
    "/tokenize": {"add_special_tokens", "continue_final_message"},
    "/detokenize": set(),
    # a mask needs an image
    "/v1/images/generations": {*OF_IMAGES, "image", "mask"},
    "/v1/images/edits": {*OF_IMAGES, "mask"},
    "/v1/embeddings": set(),
}
MODELS = {path: "echo-images" if "images" in path else "echo" for path in SEMANTIC}
MODELS["/v1/embeddings"] = "echo-embeddings"
ALLOWED, FORBIDDEN = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
GETS = ["/v1/models", "/v1/models/{name}", "/v1/workers", "/v1/images/files/{name}"]
GETS += ["/v1/chat/completions/{request_id}/events"]
GETS += ["/healthz", "/readyz", "/health", "/ping", "/version", "/metrics", "/v1/activity"]
ABSENT = "absent@nowhere"
"""The name of a worker that does not run, and may be under drain."""
DRAINS = ["/v1/workers/{worker}/drain", "/v1/workers/{worker}/resume"]
POSTS = {*SEMANTIC, *DRAINS}
# Values that the schema forbids take the generator ten times as long.
SMALL = {"/v1/completions", "/tokenize", "/detokenize"}
OPERATIONS = [(path, ALLOWED, GUIDED // (16 if path in SMALL else 4)) for path in SEMANTIC]
OPERATIONS += [(path, FORBIDDEN, GUIDED // (50 if path in SMALL else 20)) for path in SEMANTIC]
OPERATIONS += [(path, ALLOWED, max(1, GUIDED // 50)) for path in [*GETS, *DRAINS]]
OPERATIONS += [(path, FORBIDDEN, max(1, GUIDED // 50)) for path in DRAINS]


def png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(data, "PNG")
    return data.getvalue()


PNG = png()


def without_shrinking(cases: int) -> Any:
    """Hypothesis settings without a database and without shrinking: a failure is reported as it was found."""
    return settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize="FUZZ_CASES" not in os.environ,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def check_status(status: int) -> None:
    assert status < 500 or status == 503, status


@pytest.fixture(scope="module")
def api(echo: Deployment) -> Any:
    schema = schemathesis.openapi.from_url(f"{echo.url}/openapi.json")
    schema.config.update(base_url=echo.url)
    return schema


def steer(path: str, body: Any) -> None:
    """Give most bodies a served model, a valid image and whole tokens, so that they reach a worker."""
    if path not in MODELS or not isinstance(body, dict):
        return
    if isinstance(name := body.get("model"), str) and len(name) % 8:
        body["model"] = MODELS[path]
    if isinstance(tokens := body.get("tokens"), list) and len(tokens) % 8:
        # 1.0 is an integer for JSON Schema, and not for the service
        body["tokens"] = list(map(int, tokens))
    if "images" in path:
        # other names of the image files, for which the generator makes up values of any type
        for alias in ("image[]", "file", "mask[]"):
            body.pop(alias, None)
    if path == "/v1/images/generations" and len(str(body.get("prompt"))) % 4:
        # with an image it is an edit
        body.pop("image", None)
        body.pop("mask", None)
    for field in ("image", "mask"):
        if isinstance(given := body.get(field), bytes) and len(given) % 8:
            body[field] = PNG
        elif isinstance(given, str) and len(given) % 8:
            body[field] = base64.b64encode(PNG).decode()
    if "input" in body:
        body["input"] = whole(body["input"])


@contextmanager
def drained(echo: Deployment, case: Any) -> Iterator[None]:
    """Let most cases of DRAINS name a worker that exists; none of those that others use."""
    if case.path in DRAINS and len(case.path_parameters["worker"]) % 8:
        case.path_parameters["worker"] = ABSENT
    drains = Keys.of("Test").drains
    echo.redis.client.sadd(drains, ABSENT)
    yield
    echo.redis.client.srem(drains, ABSENT)


def whole(value: Any) -> Any:
    """Return lists of tokens without numbers such as 1.0, which JSON Schema takes for integers."""
    if isinstance(value, list):
        return [whole(item) for item in value]
    return int(value) if isinstance(value, float) else value


def is_valid_as_sent(case: Any, message: str) -> bool:
    """Whether the generator reports a violation that the request as sent no longer has.

    A longer text still matches a pattern without anchors. In a form every value is bytes, and a list is sent
    as its items under the same name.
    """
    if case.media_type == "multipart/form-data" and "violates `type` at" in message:
        return True
    rules = (
        "`pattern` at /properties/prompt",
        "`format` at /properties/image",
        "`format` at /properties/mask",
    )
    return any(rule in message for rule in rules)


def excused(path: str, error: Any) -> bool:
    """Whether a request that the schema allows was refused by a rule that the schema cannot express."""
    return (
        error["param"] in SEMANTIC.get(path, ())
        or (error["param"] or "").endswith("function.arguments")
        or error["code"] in ("invalid_image", "payload_too_large")
        # of a model for text, or in a message whose role has no images
        or "images" in error["message"]
        or "not a fraction" in error["message"]
        or "NUL" in error["message"]
    )


@pytest.mark.slow
@pytest.mark.timeout(max(360, CASES // 5))
@pytest.mark.parametrize(
    ("path", "mode", "cases"), OPERATIONS, ids=[f"{mode.value}:{path}" for path, mode, _ in OPERATIONS]
)
def test_every_answer_is_as_openapi_json_says(
    echo: Deployment, api: Any, path: str, mode: GenerationMode, cases: int
) -> None:
    method = "POST" if path in POSTS else "GET"
    operation = api[path][method]
    seen: Counter[int] = Counter()

    @without_shrinking(cases)
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case: Any) -> None:
        # A forbidden body is sent unchanged: steering might make it valid.
        if mode is ALLOWED:
            steer(path, case.body)
        with drained(echo, case):
            response = case.call()
        seen[response.status_code] += 1
        check_status(response.status_code)
        try:
            case.validate_response(response)
        except* RejectedPositiveData:
            if not excused(path, response.json()["error"]):
                raise
        except* AcceptedNegativeData as group:
            if not all(is_valid_as_sent(case, failure.message) for failure in group.exceptions):
                raise
        if response.status_code >= 400 and response.status_code != 503:
            headers = {name: values[0] for name, values in response.headers.items()}
            check_error_body(Answer(response.status_code, headers, response.content))

    call()
    if method == "POST" and mode is ALLOWED:
        assert seen[200] > sum(seen.values()) / 4, f"too few reach a worker: {seen}"


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return inner | st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)


any_json = nested(nested(nested(scalars)))
values = st.one_of(
    any_json,
    st.integers(),
    st.sampled_from(
        [2**31, 2**63, -(2**63) - 1, 10**40, 1e308, 5e-324, -0.0, "\0", "\u202e", "ﷺ" * 99, {}, []]
    ),
    st.lists(st.sampled_from([0, None, "", {}, []]), max_size=40),
)


def bodies(base: dict[str, Any], fields: list[str]) -> st.SearchStrategy[bytes]:
    """Return valid bodies with a few fields replaced, and the same with a few bytes replaced."""
    changes = st.dictionaries(st.sampled_from(fields) | st.text(max_size=20), values, max_size=4)
    whole = changes.map(lambda change: json.dumps({**base, **change}).encode())

    def damage(part: tuple[bytes, int, bytes]) -> bytes:
        data, place, junk = part
        place %= len(data)
        return data[:place] + junk + data[place + len(junk) :]

    damaged = st.tuples(whole, st.integers(0, 10**6), st.binary(min_size=1, max_size=4)).map(damage)
    return st.one_of(whole, whole, damaged, st.binary(max_size=60))


CHAT_BODY = {"model": "echo", "messages": HI, "max_tokens": 3}
COMPLETION_BODY = {"model": "echo", "prompt": "a", "max_tokens": 3}
IMAGE_BODY = {"model": "echo-images", "prompt": "a", "width": 64, "height": 64}
EDIT_BODY = {**IMAGE_BODY, "image": base64.b64encode(PNG).decode()}
EMBEDDING_BODY = {"model": "echo-embeddings", "input": ["a", "b"], "encoding_format": "base64"}


@pytest.mark.timeout(max(360, CASES // 5))
@pytest.mark.parametrize(
    ("path", "base", "share"),
    [
        ("/v1/chat/completions", CHAT_BODY, 0.3),
        ("/v1/completions", COMPLETION_BODY, 0.1),
        ("/tokenize", {"model": "echo", "prompt": "a"}, 0.05),
        ("/detokenize", {"model": "echo", "tokens": [1]}, 0.05),
        ("/v1/images/generations", IMAGE_BODY, 0.25),
        ("/v1/images/edits", EDIT_BODY, 0.25),
        ("/v1/embeddings", EMBEDDING_BODY, 0.25),
    ],
)
def test_bodies_of_all_kinds(
    echo: Deployment, api: Any, path: str, base: dict[str, Any], share: float
) -> None:
    schema = api.raw_schema["components"]["schemas"]
    names = {"chat": "ChatCompletionRequest", "generations": "ImageGenerationRequest"}
    names |= {"completions": "CompletionRequest", "detokenize": "DetokenizeRequest"}
    names |= {"tokenize": "TokenizeRequest", "embeddings": "EmbeddingRequest"}
    name = next((schema for word, schema in names.items() if word in path), "ImageEditRequest")
    fields = list(schema[name]["properties"])
    connection = http.client.HTTPConnection("127.0.0.1", echo.port, timeout=60)
    seen: Counter[int] = Counter()

    @without_shrinking(int((CASES - GUIDED) * share))
    @given(body=bodies(base, fields))
    def call(body: bytes) -> None:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        seen[answer.status] += 1
        check_status(answer.status)
        if answer.status != 200:
            check_error_body(answer)
            assert answer.status in (400, 404, 413, 503), answer

    try:
        call()
    finally:
        connection.close()
    assert seen[200] and seen[400], seen


def test_the_checks_can_fail(echo: Deployment, api: Any) -> None:
    """A response that is not as declared is found: here one type in the description is wrong."""
    document = json.loads(json.dumps(api.raw_schema))
    document["components"]["schemas"]["Health"]["properties"]["code"] = {"const": 1}
    wrong = schemathesis.openapi.from_dict(document)
    wrong.config.update(base_url=echo.url)
    case = wrong["/healthz"]["GET"].Case()
    with pytest.raises(BaseException, match="distinct failure"):
        case.call_and_validate()
