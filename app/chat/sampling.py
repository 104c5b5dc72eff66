"""The fields of a request that say how its tokens are sampled, and what its stream is like.

Bounds are OpenAI's where OpenAI has them, otherwise vLLM's.
"""

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
)
from pydantic_core import PydanticKnownError

from app.chat.output_format import OutputFormatFields
from app.http.validation import first_given
from app.text_input import TokenId
from catalogue import TextDefaults
from protocol.errors import InvalidRequest, UnsupportedParameter
from protocol.jobs import SamplingParams

MAX_STOP_SEQUENCES = 16
MAX_LOGIT_BIAS = 1024
MAX_N = 128


def _check_bias_count(value: object) -> object:
    # runs before the items are validated: pydantic records each invalid one, and a body has room for 400,000
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        bounds = {"field_type": "Dictionary", "max_length": MAX_LOGIT_BIAS, "actual_length": len(value)}
        raise PydanticKnownError("too_long", bounds)
    return value


def stream_options_need_stream(schema: dict[str, Any]) -> None:
    """State in JSON Schema that `stream_options` requires `stream` to be true."""
    schema["anyOf"] = [
        {"properties": {"stream": {"const": True}}, "required": ["stream"]},
        {"properties": {"stream_options": {"type": "null"}}},
    ]


Number = StrictFloat | StrictInt
_Stop = Annotated[StrictStr, Field(min_length=1, max_length=1024)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: StrictBool = False


class SamplingFields(OutputFormatFields):
    """What the bodies of chats and completions have in common.

    None means not given: the catalogue's default applies, then the model's generation config.
    """

    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_N)] | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0, le=2**31)] | None = None
    # fail_fast, here and elsewhere: a million invalid items must not become a million errors
    stop: _Stop | Annotated[list[_Stop], Field(fail_fast=True, max_length=MAX_STOP_SEQUENCES)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=1024)] | None = None
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

    @property
    def includes_usage(self) -> bool:
        """Whether a stream has a last chunk with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, defaults: TextDefaults, *, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """Make the parameters of the job. Raises InvalidRequest."""
        min_tokens = self.min_tokens or 0
        if min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens must be at most max_tokens ({max_tokens}); it is {min_tokens}",
                param="min_tokens",
            )
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
            logprobs=logprobs,
        )

    def refuse_unsupported(self, neutral: dict[str, tuple[Any, ...]], model: str) -> None:
        """Raise UnsupportedParameter for a field of `neutral` unless it has one of its values, which request
        nothing."""
        for name, values in neutral.items():
            value = getattr(self, name)
            # 1 is not true, and 0 not false
            if value is not None and not any(type(value) is type(own) and value == own for own in values):
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
