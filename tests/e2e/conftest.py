"""The demo service as a user runs it: gunicorn, three workers, the demo models, and a node beside it."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.deployment import Deployment, demo_catalogue
from tests.stand_in_node import StandInNode

CHAT = "demo-chat"
SHAPES = "demo-shapes"
PROJECT = "Demo"


@pytest.fixture(scope="session")
def node() -> Iterator[StandInNode]:
    with StandInNode() as node:
        yield node


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, node: StandInNode) -> Iterator[Deployment]:
    """Two chat workers and one image worker, registered with `node`. Tests must leave it as it is.

    tests/conftest.py names the files that use it, so that all run in one process and it is started once.
    """
    folder: Path = tmp_path_factory.mktemp("demo")
    with Deployment(folder, catalogue=demo_catalogue(), NODE_URL=node.url) as service:
        service.start(CHAT, CHAT, SHAPES)
        node.wait_for(lambda node: len(node.cids(PROJECT)) == 3, 30)
        yield service


@pytest.fixture(scope="session")
def client(demo: Deployment) -> Iterator[openai.OpenAI]:
    """The unmodified OpenAI client, without retries, so that every failure shows."""
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client
