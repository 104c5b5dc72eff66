"""The messages of a chat as clients send them, and as chat templates expect them."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictStr,
    WithJsonSchema,
    model_validator,
)

from app.http.validation import first_given
from protocol.errors import InvalidRequest, UnsupportedParameter
from protocol.jobs import FUNCTION_NAME

MAX_PARTS = 4096
MAX_TOOL_CALLS = 128
MAX_DEPTH = 100
"""Levels of a call's arguments, or of a tool's parameters. Templates write them by recursion."""

FunctionName = Annotated[StrictStr, Field(pattern=FUNCTION_NAME)]
CallId = Annotated[StrictStr, Field(min_length=1, max_length=256)]

IMAGE_ROLES = ("user", "tool")

OF_ONE_ROLE = {
    "tool_calls": "assistant",
    "refusal": "assistant",
    "reasoning_content": "assistant",
    "reasoning": "assistant",
    "tool_call_id": "tool",
}
"""Fields that only messages of one role have."""


def _state_roles(schema: dict[str, Any]) -> None:
    """State in JSON Schema what `_check_content` and `OF_ONE_ROLE` say."""
    *given, _ = schema["properties"]["content"]["anyOf"]

    def of(role: dict[str, Any], own: str) -> dict[str, Any]:
        absent = {name: {"type": "null"} for name, other in OF_ONE_ROLE.items() if other != own}
        if own == "assistant":
            return {"properties": {"role": role, **absent}}
        return {"properties": {"role": role, "content": {"anyOf": given}, **absent}, "required": ["content"]}

    others = [role for role in schema["properties"]["role"]["enum"] if role not in OF_ONE_ROLE.values()]
    schema["anyOf"] = [
        of({"const": "assistant"}, "assistant"),
        of({"const": "tool"}, "tool"),
        of({"enum": others}, ""),
    ]


def _part_of(kind: str, types: list[str]) -> dict[str, Any]:
    return {"properties": {"type": {"const": kind}, kind: {"type": types}}, "required": ["type", kind]}


class ImageSource(NamedTuple):
    """An image as a request has it. `param`: its place in the body."""

    url: str
    detail: Literal["auto", "low", "high"]
    param: str


class ImageUrl(BaseModel):
    """A link, or the image itself as a data: URL."""

    model_config = ConfigDict(extra="ignore")

    url: StrictStr
    detail: Literal["auto", "low", "high"] | None = None


class ContentPart(BaseModel):
    """One part of a message's content: text, an image, or an assistant's refusal.

    Others are refused by name.
    """

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={
            "anyOf": [
                _part_of("text", ["string"]),
                _part_of("refusal", ["string"]),
                _part_of("image_url", ["string", "object"]),
            ]
        },
    )

    type: Annotated[StrictStr, WithJsonSchema({"enum": ["text", "refusal", "image_url"]})]
    text: StrictStr | None = None
    refusal: StrictStr | None = None
    image_url: ImageUrl | StrictStr | None = None

    def image(self, place: str) -> ImageSource | None:
        """The image of the part; None for one of another type. `place`: the part's path in the body."""
        if self.type != "image_url" or self.image_url is None:
            return None
        if isinstance(self.image_url, str):
            return ImageSource(self.image_url, "auto", place)
        return ImageSource(self.image_url.url, self.image_url.detail or "auto", place)

    @property
    def own_text(self) -> str | None:
        """The text of the part; None for one of another type."""
        return {"text": self.text, "refusal": self.refusal}.get(self.type)


class FunctionCall(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: FunctionName
    arguments: Annotated[StrictStr, Field(description="a JSON object as text")]


class ToolCall(BaseModel):
    """A call that an earlier answer made."""

    model_config = ConfigDict(extra="ignore")

    id: CallId
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    """One message. Only an assistant's `content` may be null."""

    model_config = ConfigDict(extra="ignore", json_schema_extra=_state_roles)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    # fail_fast: a million invalid items must not become a million errors
    content: StrictStr | Annotated[list[ContentPart], Field(fail_fast=True, max_length=MAX_PARTS)] | None = (
        None
    )
    name: StrictStr | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_TOOL_CALLS)] | None = None
    tool_call_id: CallId | None = None
    refusal: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    reasoning: StrictStr | None = None

    @model_validator(mode="after")
    def _check_content(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise ValueError("content must be a string or a list of parts")
        return self

    def to_template(self, place: str) -> dict[str, Any]:
        """Return the message for a chat template. `place`: its path in the body, "messages.0".

        Text parts are joined, or are `{"type": "text", "text": ...}` beside `{"type": "image"}` in a message
        with images. The role "developer" is "system", arguments of calls are objects. Raises InvalidRequest
        and UnsupportedParameter.
        """
        for name, role in OF_ONE_ROLE.items():
            if getattr(self, name) is not None and self.role != role:
                raise InvalidRequest(
                    f"{name} belongs into a message with the role {role}, not {self.role}",
                    param=f"{place}.{name}",
                )
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            # templates join it with other text, whether or not there are calls
            "content": self._content(place) or self.refusal or "",
        }
        if (reasoning := first_given(self.reasoning_content, self.reasoning)) is not None:
            message["reasoning_content"] = reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(call.function.arguments, f"{place}.tool_calls.{number}"),
                    },
                }
                for number, call in enumerate(self.tool_calls)
            ]
        for name in ("tool_call_id", "name"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        return message

    def images(self, place: str) -> Iterator[ImageSource]:
        """Yield the images of the message. `place`: as for `to_template`."""
        if isinstance(self.content, list):
            for number, part in enumerate(self.content):
                if (image := part.image(f"{place}.content.{number}")) is not None:
                    yield image

    def _content(self, place: str) -> str | list[dict[str, Any]] | None:
        if not isinstance(self.content, list):
            return self.content
        parts: list[dict[str, Any]] = []
        for number, part in enumerate(self.content):
            param = f"{place}.content.{number}"
            if (text := part.own_text) is not None:
                parts.append({"type": "text", "text": text})
            elif part.image(param) is None:
                raise UnsupportedParameter(
                    f"content parts of type {part.type[:40]!r} are not supported as they were sent; send"
                    " text or image_url parts",
                    param=param,
                )
            elif self.role not in IMAGE_ROLES:
                raise InvalidRequest(
                    f"images belong into messages with the role {' or '.join(IMAGE_ROLES)}, not {self.role}",
                    param=param,
                )
            else:
                parts.append({"type": "image"})
        if any(part["type"] == "image" for part in parts):
            return parts
        return "".join(part["text"] for part in parts)


def images_of(messages: list[ChatMessage]) -> list[ImageSource]:
    """Return the images of all messages, in order."""
    return [image for index, message in enumerate(messages) for image in message.images(f"messages.{index}")]


def is_too_deep(value: Any) -> bool:
    """Whether a value from JSON is nested more than MAX_DEPTH levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for outer in level
            for item in (
                outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ()
            )
        ]
        if not level:
            return False
    return True


def _arguments(text: str, place: str) -> dict[str, Any]:
    """Return a call's arguments as templates want them. No text stands for none, as some clients send it."""
    try:
        arguments = msgspec.json.decode(text) if text.strip() else {}
    except (msgspec.DecodeError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict) or is_too_deep(arguments):
        raise InvalidRequest(
            "arguments must be a JSON object as text, as in the answer that made the call",
            param=f"{place}.function.arguments",
        )
    return arguments
