"""app.http.validation: pydantic's errors as messages for clients."""

from typing import Literal

import pytest
from pydantic import BaseModel, StrictFloat, StrictInt, StrictStr

from app.http.validation import parse
from protocol.errors import InvalidRequest


class Part(BaseModel):
    type: StrictStr


class Turn(BaseModel):
    role: Literal["user", "system"]
    content: StrictStr | list[Part] | None = None


class Body(BaseModel):
    turns: list[Turn]
    heat: StrictFloat | StrictInt | None = None


GOOD = {"role": "user", "content": "SECRET"}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "turns", "turns is required"),
        ({"turns": 5}, "turns", "turns must be a list, not a whole number"),
        ({"turns": None}, "turns", "turns must be a list, not null"),
        ({"turns": ["SECRET"]}, "turns.0", "turns.0 must be an object, not a string"),
        ({"turns": [GOOD, {}]}, "turns.1.role", "turns.1.role is required"),
        ({"turns": [{"role": "SECRET"}]}, "turns.0.role", "turns.0.role must be one of 'user' or 'system'"),
        ({"turns": [GOOD], "heat": "SECRET"}, "heat", "heat must be a number, not a string"),
        ({"turns": [GOOD], "heat": False}, "heat", "heat must be a number, not false"),
        (
            {"turns": [{"role": "user", "content": 1.5}]},
            "turns.0.content",
            "turns.0.content must be a string or a list, not a fraction",
        ),
        (
            {"turns": [{"role": "user", "content": [{"type": "text"}, {"type": 5}]}]},
            "turns.0.content.1.type",
            "turns.0.content.1.type must be a string, not a whole number",
        ),
        (
            {"turns": [{"role": "user", "content": [{"text": "SECRET"}]}]},
            "turns.0.content.0.type",
            "turns.0.content.0.type is required",
        ),
    ],
)
def test_the_first_error_names_the_path_in_the_body(body, param, message):
    with pytest.raises(InvalidRequest) as caught:
        parse(Body, body)
    assert (caught.value.param, caught.value.message) == (param, message)
    assert "SECRET" not in caught.value.message


def test_a_good_body_passes():
    assert parse(Body, {"turns": [GOOD], "heat": 1}).turns[0].content == "SECRET"
