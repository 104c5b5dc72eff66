"""Clients for Node.js: each file of tests/clients/node has its own tests, and this shows those that fail."""

import pytest

from tests.clients.conftest import FOLDER, check_client, set_up
from tests.security.conftest import KeyedDeployment

pytestmark = [pytest.mark.node, pytest.mark.timeout(600)]


def test_openai_node(service: KeyedDeployment, limited: KeyedDeployment) -> None:
    set_up("openai-node")
    check(service, limited, "openai.test.mjs")


@pytest.mark.clients
def test_ai_sdk(service: KeyedDeployment, limited: KeyedDeployment) -> None:
    set_up("node")
    check(service, limited, "ai-sdk.test.mjs")


def check(service: KeyedDeployment, limited: KeyedDeployment, file: str) -> None:
    """Run one file of tests, each in it for a minute at most."""
    options = ["--test", "--test-reporter=spec", "--test-timeout=60000"]
    check_client(service, limited, ["node", *options, FOLDER / "node" / file])
