"""openai-python, unmodified: its helpers for structured answers, tools and streams, images and errors."""

import asyncio
import base64
import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any, Literal

import openai
import pydantic
import pytest
from PIL import Image

from demo.check import dominant_colour
from tests.clients.conftest import ABSENT, KEY
from tests.security.conftest import KeyedDeployment


class Point(pydantic.BaseModel):
    colour: Literal["red", "green"]
    at: Literal[7]


class add(pydantic.BaseModel):
    """Add two numbers."""

    a: Literal[3]
    b: Literal[4]


ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
"""The same tool without `strict`, whose arguments the model chooses."""


@pytest.fixture(scope="module")
def client(service: KeyedDeployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def asking(text: str, model: str = "scripted") -> Any:
    return {"model": model, "messages": [{"role": "user", "content": text}]}


def test_parse_returns_the_class_that_it_was_given(client):
    answer = client.chat.completions.parse(**asking("Where is the ball?"), response_format=Point)
    assert isinstance(answer.choices[0].message.parsed, Point)


def test_parse_reads_the_arguments_of_a_tool(client):
    answer = client.chat.completions.parse(
        **asking("What is 3 + 4?"), tools=[openai.pydantic_function_tool(add)]
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == add(a=3, b=4)


def test_parse_raises_for_an_answer_that_was_cut(client):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**asking("Where is the ball?"), response_format=Point, max_tokens=2)


def test_stream_helper_collects_text(client):
    with client.chat.completions.stream(
        **asking("Count to twelve."), stream_options={"include_usage": True}
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    (done,) = [event for event in events if event.type == "content.done"]
    deltas = [event.delta for event in events if event.type == "content.delta"]
    assert len(deltas) > 3
    assert "".join(deltas) == done.content == final.choices[0].message.content
    assert done.content.endswith("eleven, twelve.")
    assert final.usage.completion_tokens > 3


def test_stream_helper_parses_a_structured_answer(client):
    with client.chat.completions.stream(**asking("Where is the ball?"), response_format=Point) as stream:
        (done,) = [event for event in stream if event.type == "content.done"]
    assert isinstance(done.parsed, Point)


def test_stream_helper_collects_calls(client):
    request = asking("What are 2 + 2 and 5 + 6?")
    with client.chat.completions.stream(**request, tools=[ADD]) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [(event.index, event.name, json.loads(event.arguments)) for event in done] == [
        (0, "add", {"a": 2, "b": 2}),
        (1, "add", {"a": 5, "b": 6}),
    ]
    pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert len(pieces) > 2
    assert final.finish_reason == "tool_calls"
    assert (final.message.content or "").strip() == "I add twice."
    assert len({call.id for call in final.message.tool_calls}) == 2


def test_a_conversation_goes_on_with_the_clients_own_message(client):
    """What the client parsed is sent back as it is, and the result after it."""
    request = asking("What is 3 + 4?")
    tools = [openai.pydantic_function_tool(add)]
    message = client.chat.completions.parse(**request, tools=tools).choices[0].message
    (call,) = message.tool_calls
    request["messages"] += [message, {"role": "tool", "tool_call_id": call.id, "content": "7"}]
    answer = client.chat.completions.parse(**request, tools=tools)
    assert answer.choices[0].message.content == "3 + 4 is 7."
    assert answer.choices[0].finish_reason == "stop"


def test_a_named_tool_is_called(client):
    tool: Any = openai.pydantic_function_tool(Point)
    answer = client.chat.completions.parse(
        **asking("Point at the ball."),
        tools=[openai.pydantic_function_tool(add), tool],
        tool_choice={"type": "function", "function": {"name": "Point"}},
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Point)


def test_asynchronous_requests_at_once(service):
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0) as client:

            async def ask(text: str) -> str:
                stream = await client.chat.completions.create(**asking(text), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(ask(text) for text in ["Hello!", "Count to twelve."] * 4))

    answers = asyncio.run(ask_all())
    assert len(answers) == 8
    assert {answer.split()[0] for answer in answers} == {"Hello!", "One,"}


def test_a_stream_can_be_left(client):
    stream = client.chat.completions.create(**asking("Count to twelve."), stream=True)
    next(iter(stream))
    stream.close()
    assert client.chat.completions.create(**asking("Hello!")).choices[0].message.content


def test_raw_responses_have_the_request_id(client):
    raw = client.chat.completions.with_raw_response.create(
        **asking("Hello!"), extra_headers={"X-Request-Id": "of-the-client"}
    )
    assert raw.headers["x-request-id"] == "of-the-client"
    assert raw.parse().choices[0].message.content == "Hello! How can I help you?"


def test_images(client):
    drawn = client.images.generate(
        model="shapes", prompt="a red circle", n=2, response_format="b64_json", extra_body={"seed": 5}
    )
    red, other = (base64.b64decode(image.b64_json or "") for image in drawn.data or [])
    assert red != other
    assert dominant_colour(Image.open(BytesIO(red)).convert("RGB")) == "red"
    edited = client.images.edit(
        model="shapes", image=[("red.png", red)], prompt="a blue circle", response_format="b64_json"
    )
    (blue,) = (base64.b64decode(image.b64_json or "") for image in edited.data or [])
    assert dominant_colour(Image.open(BytesIO(blue)).convert("RGB")) == "blue"


def test_models(client):
    assert {model.id for model in client.models.list()} == {
        "scripted",
        "thinking",
        "shapes",
        "echo-images",
        "echo",
        ABSENT,
    }
    assert client.models.retrieve("scripted").owned_by == "Clients"


def opened(event: Any) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(event.b64_json)))


def test_a_stream_of_an_image_has_previews_and_then_the_image(client):
    asked: Any = {"model": "shapes", "stream": True, "partial_images": 2}
    extra = {"seed": 3, "steps": 6}
    events = list(client.images.generate(**asked, prompt="a red circle", extra_body=extra))
    *previews, final = events
    assert [(event.type, event.partial_image_index) for event in previews] == [
        ("image_generation.partial_image", 0),
        ("image_generation.partial_image", 1),
    ]
    assert final.type == "image_generation.completed" and final.usage.total_tokens == 0
    for event in events:
        # each field of the client's own class, with a value of its type
        type(event).model_validate(event.model_dump(), strict=True)
        assert opened(event).format == event.output_format.upper()
        assert "{}x{}".format(*opened(event).size) == event.size
    plain = client.images.generate(
        model="shapes", prompt="a red circle", response_format="b64_json", extra_body=extra
    )
    assert plain.data[0].b64_json == final.b64_json, "previews change nothing"

    red = base64.b64decode(final.b64_json)
    *previews, final = client.images.edit(**asked, image=("red.png", red), prompt="a blue circle")
    assert {event.type for event in previews} == {"image_edit.partial_image"}
    assert final.type == "image_edit.completed"
    assert dominant_colour(opened(final).convert("RGB")) == "blue"


def test_a_stream_of_several_images_has_each(client):
    events = list(client.images.generate(model="shapes", prompt="a red circle", n=3, stream=True))
    assert [event.type for event in events] == ["image_generation.completed"] * 3
    assert sorted(event.image_index for event in events) == [0, 1, 2]


def test_asynchronous_streams_of_images(service):
    async def previews() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0) as client:
            stream = await client.images.generate(
                model="shapes", prompt="a red circle", stream=True, partial_images=1, extra_body={"steps": 4}
            )
            return [event.type async for event in stream]

    assert asyncio.run(previews()) == ["image_generation.partial_image", "image_generation.completed"]


def test_a_stream_of_an_image_that_breaks_off_raises(client):
    asked: Any = {"model": "echo-images", "prompt": "raise after three tokens", "stream": True}
    stream = client.images.generate(**asked, partial_images=1)
    assert next(stream).type == "image_generation.partial_image"
    with pytest.raises(openai.APIError, match="failed on this request") as caught:
        list(stream)
    assert caught.value.code == "engine_error"


@pytest.mark.parametrize("helper", [False, True])
def test_a_stream_that_breaks_off_raises(client, helper):
    chats = client.chat.completions
    request = asking("raise after three tokens", "echo")
    text = ""
    with pytest.raises(openai.APIError, match="failed on this request") as caught:
        if helper:
            with chats.stream(**request) as stream:
                for event in stream:
                    text += event.delta if event.type == "content.delta" else ""
        else:
            for chunk in chats.create(**request, stream=True):
                text += chunk.choices[0].delta.content or ""
    assert text == "0 1 2 "
    assert caught.value.code == "engine_error"


REFUSED: list[tuple[type[openai.APIStatusError], str, dict[str, Any]]] = [
    (openai.BadRequestError, "context_length_exceeded", asking("word " * 2000)),
    (openai.BadRequestError, "invalid_request", asking("Hello!") | {"temperature": 9}),
    (openai.NotFoundError, "model_not_found", asking("Hello!", "gpt-9")),
    (openai.InternalServerError, "no_worker", asking("Hello!", ABSENT)),
    (openai.InternalServerError, "engine_error", asking("raise", "echo")),
]


@pytest.mark.parametrize(("kind", "code", "request_"), REFUSED, ids=[code for _, code, _ in REFUSED])
def test_refusals_are_exceptions_of_the_client(client, kind, code, request_):
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**request_, stream=stream)
        assert caught.value.code == code
        assert caught.value.request_id


def test_the_client_does_not_repeat_what_it_should_not(client):
    with pytest.raises(openai.InternalServerError) as caught:
        client.with_options(max_retries=2).chat.completions.create(**asking("out of memory", "echo"))
    assert caught.value.code == "out_of_memory"
    assert caught.value.request.headers["x-stainless-retry-count"] == "0"


def test_a_wrong_key_and_a_limit_are_exceptions_of_the_client(client, limited):
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.RateLimitError):
        client.with_options(base_url=f"{limited.url}/v1").chat.completions.create(**asking("Hello!"))
