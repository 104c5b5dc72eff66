"""What the tests of the page share: one Chromium for each file, and one service with and without keys."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.console.browser import DESKTOP, PHONE, Screen, chromium
from tests.deployment import ECHO_CATALOGUE, Deployment, free_port
from tests.stand_in_node import StandInNode

CATALOGUE = ECHO_CATALOGUE.format(step_ms=20, slots=2)
KEY = "käse-key-1"
CLIENT_KEY = "client-key-2"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Not for the whole session: Playwright keeps an event loop, which others' tests must not find
    running."""
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Web, a chat and an image worker of the echo engine, registered with a node. Tests leave it as it is."""
    folder: Path = tmp_path_factory.mktemp("console")
    with StandInNode() as node:
        with Deployment(folder, catalogue=CATALOGUE, NODE_URL=node.url) as service:
            service.start("echo", "echo-images")
            node.wait_for(lambda node: len(node.cids("Test")) == 2, 30)
            yield service


@pytest.fixture(scope="session")
def keyed(tmp_path_factory: pytest.TempPathFactory, service: Deployment) -> Iterator[Deployment]:
    """Another web process of `service`, which wants a key: KEY is an operator's, CLIENT_KEY a client's."""
    folder: Path = tmp_path_factory.mktemp("console-keyed")
    with Deployment(
        folder,
        catalogue=CATALOGUE,
        redis_server=service.redis,
        NODE_URL="",
        API_KEYS=f"{KEY},{CLIENT_KEY}",
        OPERATOR_KEYS=KEY,
    ) as keyed:
        keyed.start_web(NODE_BIND=f"127.0.0.1:{free_port()}")
        yield keyed


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def screen(request: pytest.FixtureRequest) -> Screen:
    """Runs the test at both sizes."""
    found: Screen = request.param
    return found
