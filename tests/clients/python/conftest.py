"""The service under test, as tests/clients/conftest.py started it.

Nothing of the project is imported here.
"""

import os
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Service:
    url: str
    limited_url: str
    """A web process that answers every request for an answer with 429."""
    key: str
    absent_model: str


@pytest.fixture(scope="session")
def service() -> Service:
    return Service(
        os.environ["SERVICE_URL"],
        os.environ["LIMITED_URL"],
        os.environ["SERVICE_KEY"],
        os.environ["ABSENT_MODEL"],
    )
