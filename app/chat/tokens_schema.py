"""The bodies of POST /tokenize and POST /detokenize, with vLLM's fields, and their jobs."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, WithJsonSchema, model_validator

from app.chat.messages import ChatMessage, images_of
from app.chat.schema import MAX_MESSAGES
from app.chat.tools import Tools, tools_for_job
from app.dispatch.models import no_chat_template
from app.text_input import TokenId
from catalogue import ChatModelEntry, TextModelEntry
from protocol.errors import InvalidRequest, UnsupportedParameter
from protocol.jobs import ChatJob, DetokenizeJob, SamplingParams, TokenizeJob

MAX_TOKENS = 2**18
"""Of /detokenize."""

Model = Annotated[StrictStr, Field(min_length=1, max_length=256)] | None
"""May be left out if there is one model for texts."""


def _one_text(schema: dict[str, Any]) -> None:
    """State in JSON Schema that a body has a prompt or messages."""
    absent = {"type": "null"}
    schema["anyOf"] = [
        {"properties": {"prompt": {"type": "string"}, "messages": absent}, "required": ["prompt"]},
        {"properties": {"messages": {"type": "array"}, "prompt": absent}, "required": ["messages"]},
    ]


class TokenizeRequest(BaseModel):
    """The body of /tokenize: a prompt, or a chat with what makes a prompt of it."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), json_schema_extra=_one_text)

    model: Model = None
    prompt: StrictStr | None = None
    messages: (
        Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] | None
    ) = None
    add_special_tokens: StrictBool | None = None
    return_token_strs: StrictBool | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    # refused by `to_job`
    chat_template: Annotated[Any, WithJsonSchema({"type": "null"})] = None

    @model_validator(mode="after")
    def _check_text(self) -> "TokenizeRequest":
        if (self.prompt is None) is (self.messages is None):
            raise ValueError("it must have a prompt or messages, and not both")
        return self

    def to_job(self, request_id: str, entry: TextModelEntry) -> TokenizeJob:
        """Make the job. Raises InvalidRequest and UnsupportedParameter."""
        chat = self._chat(entry)
        return TokenizeJob(
            id=request_id,
            model=entry.name,
            text=self.prompt or "",
            add_special_tokens=self.add_special_tokens is not False,
            chat=chat,
            add_generation_prompt=self.add_generation_prompt is not False,
            with_strings=bool(self.return_token_strs),
        )

    def _chat(self, entry: TextModelEntry) -> ChatJob | None:
        if self.chat_template is not None:
            raise UnsupportedParameter(
                "chat_template is not supported: the model's own is used; leave it out", param="chat_template"
            )
        if self.messages is None:
            return None
        if not isinstance(entry, ChatModelEntry):
            raise no_chat_template(entry.name)
        if images := images_of(self.messages):
            raise UnsupportedParameter("images are not counted here; send text parts", param=images[0].param)
        if self.add_special_tokens:
            raise UnsupportedParameter(
                "add_special_tokens is not supported beside messages: the chat template writes such tokens",
                param="add_special_tokens",
            )
        continued = bool(self.continue_final_message)
        if continued and (self.add_generation_prompt or self.messages[-1].role != "assistant"):
            raise InvalidRequest(
                "continue_final_message requires the last message to have the role assistant, and excludes"
                " add_generation_prompt",
                param="continue_final_message",
            )
        return ChatJob(
            id="",
            model=entry.name,
            messages=[
                message.to_template(f"messages.{index}") for index, message in enumerate(self.messages)
            ],
            sampling=SamplingParams(),
            chat_template_kwargs={**entry.defaults.chat_template_kwargs, **(self.chat_template_kwargs or {})},
            continue_final_message=continued,
            **tools_for_job(self.tools, None, None)._asdict(),
        )


class DetokenizeRequest(BaseModel):
    """The body of /detokenize."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: Model = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_TOKENS)]

    def to_job(self, request_id: str, entry: TextModelEntry) -> DetokenizeJob:
        """Make the job."""
        return DetokenizeJob(id=request_id, model=entry.name, tokens=self.tokens)
