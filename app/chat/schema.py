"""The body of POST /v1/chat/completions, with OpenAI's fields and those that vLLM adds, and its job.

Unknown fields are ignored and reported. Known fields that are not supported are refused, never silently
dropped. Bounds are OpenAI's where OpenAI has them, otherwise vLLM's.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    WithJsonSchema,
)
from pydantic_core import PydanticKnownError

from app.chat.messages import ChatMessage
from app.chat.output_format import OutputFormatFields
from app.chat.tools import ToolChoice, Tools, tools_for_job
from app.http.validation import first_given
from catalogue import ChatDefaults, ChatModelEntry
from protocol.errors import InvalidRequest, UnsupportedParameter
from protocol.jobs import ChatJob, SamplingParams

MAX_MESSAGES = 4096
MAX_STOP_SEQUENCES = 16
MAX_LOGIT_BIAS = 1024
MAX_N = 128
MAX_TOKEN_ID = 2**31


def _check_bias_count(value: object) -> object:
    # runs before the items are validated: pydantic records each invalid one, and a body has room for 400,000
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        bounds = {"field_type": "Dictionary", "max_length": MAX_LOGIT_BIAS, "actual_length": len(value)}
        raise PydanticKnownError("too_long", bounds)
    return value


def _stream_options_need_stream(schema: dict[str, Any]) -> None:
    """State in JSON Schema that `stream_options` requires `stream` to be true."""
    schema["anyOf"] = [
        {"properties": {"stream": {"const": True}}, "required": ["stream"]},
        {"properties": {"stream_options": {"type": "null"}}},
    ]


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


Number = StrictFloat | StrictInt
_TokenId = Annotated[StrictInt, Field(ge=0, lt=MAX_TOKEN_ID)]
_Stop = Annotated[StrictStr, Field(min_length=1, max_length=1024)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: StrictBool = False


class ChatCompletionRequest(OutputFormatFields):
    """The body. None means not given: the catalogue's default applies, then the model's generation config."""

    model_config = ConfigDict(
        extra="ignore", protected_namespaces=(), json_schema_extra=_stream_options_need_stream
    )

    model: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    # fail_fast, here and below: a million invalid items must not become a million errors
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_N)] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, le=2**31)] | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0, le=2**31)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(fail_fast=True, max_length=MAX_STOP_SEQUENCES)] | None = None
    stop_token_ids: Annotated[list[_TokenId], Field(fail_fast=True, max_length=1024)] | None = None
    ignore_eos: StrictBool | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[Number, Field(ge=-100, le=100)]],
            Field(
                max_length=MAX_LOGIT_BIAS, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}}
            ),
            BeforeValidator(_check_bias_count),
        ]
        | None
    ) = None
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

    def to_job(self, request_id: str, entry: ChatModelEntry) -> ChatJob:
        """Make the job for a worker. A value comes from the request, else from the catalogue's defaults, else
        it is None and the model's generation config decides.

        Raises InvalidRequest and UnsupportedParameter.
        """
        self._refuse_unsupported(entry.name)
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
        max_tokens = self.max_completion_tokens or self.max_tokens or defaults.max_tokens
        min_tokens = self.min_tokens or 0
        if min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens must be at most max_tokens ({max_tokens}); it is {min_tokens}",
                param="min_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs requires logprobs to be true", param="top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options requires stream to be true", param="stream_options")
        top_k = first_given(self.top_k, defaults.top_k)
        # the smallest nucleus is the best token alone, which is what temperature 0 chooses
        greedy = self.top_p == 0
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=0.0 if greedy else first_given(self.temperature, defaults.temperature),
            top_p=None if greedy else first_given(self.top_p, defaults.top_p),
            top_k=0 if top_k == -1 else top_k,
            min_p=first_given(self.min_p, defaults.min_p),
            seed=self.seed,
            n=self.n or 1,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            presence_penalty=first_given(self.presence_penalty, defaults.presence_penalty) or 0.0,
            frequency_penalty=first_given(self.frequency_penalty, defaults.frequency_penalty) or 0.0,
            repetition_penalty=first_given(self.repetition_penalty, defaults.repetition_penalty),
            logit_bias=_logit_bias(self.logit_bias or {}),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    def _continues_final_message(self) -> bool:
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise InvalidRequest(
                "continue_final_message requires the last message to have the role assistant",
                param="continue_final_message",
            )
        return bool(self.continue_final_message)

    def _refuse_unsupported(self, model: str) -> None:
        for name, neutral in _UNSUPPORTED.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                raise UnsupportedParameter(
                    f"{name} is not supported by model {model!r}; leave it out", param=name
                )


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    """Convert the keys to token ids. Raises InvalidRequest."""
    for token in bias:
        if not token.isascii() or not token.isdigit() or len(token) > 9:
            raise InvalidRequest(
                f"logit_bias: {token[:20]!r} is not a token id; keys must be whole numbers",
                param="logit_bias",
            )
    return {int(token): value for token, value in bias.items()}
