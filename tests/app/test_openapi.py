"""The description of the API against the routes of the app: every endpoint, no other, and examples that are
valid."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from app import create_app
from app.operations.openapi import describe
from config import Settings
from tests.security.conftest import CATALOGUE, EMBEDDINGS

PAGES = {"/", "/docs", "/static/<path:filename>"}
MODELS = {
    "chat": "echo",
    "generation": "echo-images",
    "edit": "echo-images",
    "embedding": "echo-embeddings",
}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    models: Path = tmp_path_factory.mktemp("openapi") / "models.toml"
    models.write_text(CATALOGUE + EMBEDDINGS)
    return create_app(Settings(models_file=models, node_url=""))


@pytest.fixture(scope="module")
def document(app: Any) -> Any:
    return app.test_client().get("/openapi.json").json


def operations(document: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield method, path, operation


def contents(operation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The contents of an operation's body and responses."""
    yield from operation.get("requestBody", {}).get("content", {}).values()
    for response in operation["responses"].values():
        yield from response.get("content", {}).values()


def test_every_endpoint_is_described_and_no_other(app: Any, document: Any) -> None:
    routes = {
        (method.lower(), re.sub(r"<(?:\w+:)?(\w+)>", "{}", rule.rule))
        for rule in app.url_map.iter_rules()
        if rule.rule not in PAGES
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    described = {(method, re.sub(r"{\w+}", "{}", path)) for method, path, _ in operations(document)}
    assert described == routes


def test_parameters_of_paths_are_declared(document: Any) -> None:
    for _, path, operation in operations(document):
        declared = {each["name"] for each in operation.get("parameters", []) if each["in"] == "path"}
        assert declared == set(re.findall(r"{(\w+)}", path)), path


def test_operations_have_names_and_groups(document: Any) -> None:
    names = Counter(operation["operationId"] for *_, operation in operations(document))
    assert set(names.values()) == {1}
    groups = {tag for *_, operation in operations(document) for tag in operation["tags"]}
    assert groups == {tag["name"] for tag in document["tags"]}


def test_schemas_and_references_are_valid(document: Any) -> None:
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)

    def check(part: Any) -> None:
        if isinstance(part, list):
            for each in part:
                check(each)
        elif isinstance(part, dict):
            if isinstance(found := part.get("$ref"), str):
                _, *names = found.split("/")
                place = document
                for name in names:
                    place = place[name]
            for each in part.values():
                check(each)

    check(document)


@pytest.mark.parametrize(
    ("value", "is_valid"), [("data:,", True), (["data:,"], True), (None, True), ({}, False)]
)
def test_a_generation_may_have_an_image(document: Any, value: Any, is_valid: bool) -> None:
    reference = {"$ref": "#/components/schemas/ImageGenerationRequest"}
    validator = Draft202012Validator({**document, **reference})
    body = {"model": "m", "prompt": "p"}
    assert validator.is_valid(body)
    assert [validator.is_valid({**body, name: value}) for name in ("image", "mask")] == [is_valid] * 2


def test_every_body_has_examples_which_are_valid(document: Any) -> None:
    checked = 0
    for method, path, operation in operations(document):
        for content in contents(operation):
            schema = {**content["schema"], "components": document["components"]}
            examples = [each["value"] for each in content.get("examples", {}).values()]
            examples += [content["example"]] if "example" in content else []
            for example in examples:
                Draft202012Validator(schema).validate(example)
                checked += 1
        if method == "post":
            body = operation["requestBody"]["content"]["application/json"]
            assert body.get("examples") or body.get("example") == {}, path
    assert checked > 50


def test_examples_name_models_that_are_served(document: Any) -> None:
    served = set(MODELS.values())
    for _, path, operation in operations(document):
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        for example in body.get("examples", {}).values():
            assert example["value"]["model"] in served, path
    without = describe("http://x", {})["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]
    examples = without["application/json"]["examples"].values()
    assert {example["value"]["model"] for example in examples} == {"embedding-model"}
