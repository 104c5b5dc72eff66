"""instructor: a class as the answer, in each of its modes, also while it arrives, and in lists."""

from typing import Literal

import instructor
import openai
import pytest
from instructor.core import InstructorRetryException
from pydantic import BaseModel, ConfigDict


class Point(BaseModel):
    """A point on the table, of which there is one."""

    model_config = ConfigDict(extra="forbid")

    colour: Literal["red"]
    at: Literal[7]


BALL = {"colour": "red", "at": 7}
MODES = [
    instructor.Mode.TOOLS,
    instructor.Mode.TOOLS_STRICT,
    instructor.Mode.JSON_SCHEMA,
]


def client(service, mode):
    with_key = openai.OpenAI(base_url=service.url, api_key=service.key, max_retries=0)
    return instructor.from_openai(with_key, mode=mode)


def asking(text, model="scripted"):
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_retries": 0}


@pytest.mark.parametrize("mode", MODES)
def test_create(service, mode):
    answer = client(service, mode).create(response_model=Point, **asking("Where is the ball?"))
    assert isinstance(answer, Point)
    assert answer.model_dump() == BALL


@pytest.mark.parametrize("mode", MODES)
def test_create_partial(service, mode):
    parts = list(client(service, mode).create_partial(response_model=Point, **asking("Where is the ball?")))
    assert len(parts) > 1
    assert parts[-1].model_dump() == BALL


def test_json_mode(service):
    answer = client(service, instructor.Mode.JSON).create(response_model=Point, **asking("Answer in JSON."))
    assert answer.model_dump() == BALL


def test_errors(service):
    with pytest.raises(InstructorRetryException, match="maximum context length"):
        client(service, instructor.Mode.TOOLS).create(response_model=Point, **asking("word " * 2000))
