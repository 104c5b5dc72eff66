"""Clients in Python except openai-python: each has tests of its own in tests/clients/python, run by the
pytest of the clients' environment. This shows those that fail."""

import pytest

from tests.clients.conftest import FOLDER, check_client, set_up
from tests.deployment import ROOT
from tests.security.conftest import KeyedDeployment

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]


@pytest.mark.parametrize("client", ["instructor", "langchain", "litellm", "llm"])
def test_python_client(service: KeyedDeployment, limited: KeyedDeployment, client: str) -> None:
    set_up("python")
    python = ROOT / ".venv-clients/bin/python"
    file = FOLDER / f"python/check_{client}.py"
    check_client(service, limited, [python, "-m", "pytest", "-q", "--disable-warnings", file])
