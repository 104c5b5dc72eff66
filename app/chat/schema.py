"""The body of POST /v1/chat/completions, with OpenAI's fields and those that vLLM adds, and its job.

Unknown fields are ignored and reported. Known fields that are not supported are refused, never silently
dropped.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictBool, StrictInt, StrictStr, WithJsonSchema

from app.chat.messages import ChatMessage, ImageSource, images_of
from app.chat.sampling import SamplingFields, stream_options_need_stream
from app.chat.tools import ToolChoice, Tools, tools_for_job
from catalogue import ChatDefaults, ChatModelEntry
from protocol.errors import InvalidRequest
from protocol.jobs import ChatJob, SamplingParams

MAX_MESSAGES = 4096


_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
}
"""Fields that are not supported, and their values that request nothing; any other is refused by `to_job`."""


def _unsupported(name: str) -> Any:
    return WithJsonSchema({"enum": [None, *_UNSUPPORTED[name]]})


class ChatCompletionRequest(SamplingFields):
    """The body. None means not given: the catalogue's default applies, then the model's generation config."""

    model_config = ConfigDict(
        extra="ignore", protected_namespaces=(), json_schema_extra=stream_options_need_stream
    )

    model: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    # fail_fast: a million invalid items must not become a million errors
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[StrictInt, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, le=2**31)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: StrictBool | None = None

    # refused by `to_job` unless the value requests nothing
    functions: Annotated[Any, _unsupported("functions")] = None
    function_call: Annotated[Any, _unsupported("function_call")] = None
    audio: Annotated[Any, _unsupported("audio")] = None
    modalities: Annotated[Any, _unsupported("modalities")] = None
    prediction: Annotated[Any, _unsupported("prediction")] = None
    web_search_options: Annotated[Any, _unsupported("web_search_options")] = None

    def images(self) -> list[ImageSource]:
        """Return the images of all messages, in order."""
        return images_of(self.messages)

    def to_job(self, request_id: str, entry: ChatModelEntry) -> ChatJob:
        """Make the job for a worker. A value comes from the request, else from the catalogue's defaults, else
        it is None and the model's generation config decides. The files of images are added later
        (app/chat/images.py).

        Raises InvalidRequest and UnsupportedParameter.
        """
        self.refuse_unsupported(_UNSUPPORTED, entry.name)
        return ChatJob(
            id=request_id,
            model=entry.name,
            messages=[
                message.to_template(f"messages.{index}") for index, message in enumerate(self.messages)
            ],
            sampling=self._sampling(entry.defaults),
            chat_template_kwargs={**entry.defaults.chat_template_kwargs, **(self.chat_template_kwargs or {})},
            continue_final_message=self._continues_final_message(),
            reasoning_effort=self.reasoning_effort,
            **tools_for_job(self.tools, self.tool_choice, self.parallel_tool_calls)._asdict(),
            output_format=self.output_format(),
        )

    def _sampling(self, defaults: ChatDefaults) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs requires logprobs to be true", param="top_logprobs")
        return self.sampling(
            defaults,
            max_tokens=self.max_completion_tokens or self.max_tokens or defaults.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    def _continues_final_message(self) -> bool:
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise InvalidRequest(
                "continue_final_message requires the last message to have the role assistant",
                param="continue_final_message",
            )
        return bool(self.continue_final_message)
