"""The demo service as a user has it: real gunicorn, three real workers, the demo models, and a node beside it."""

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
    """Two chat workers and one picture worker, registered with `node`. Shared: a test must not break it."""
    folder: Path = tmp_path_factory.mktemp("demo")
    with Deployment(folder, catalogue=demo_catalogue(), NODE_URL=node.url) as service:
        service.start(CHAT, CHAT, SHAPES)
        node.wait_for(lambda node: len(node.cids(PROJECT)) == 3, 30)
        yield service


@pytest.fixture(scope="session")
def client(demo: Deployment) -> Iterator[openai.OpenAI]:
    """The unmodified OpenAI client. No retries of its own: what fails shall show."""
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client
