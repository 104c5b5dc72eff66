"""The body of POST /v1/completions, with OpenAI's fields and those that vLLM adds, and its jobs."""

from collections.abc import Sequence
from math import ceil
from typing import Annotated, Any

from pydantic import ConfigDict, Discriminator, Field, StrictBool, StrictInt, StrictStr, Tag, WithJsonSchema

from app.chat.sampling import SamplingFields, stream_options_need_stream
from app.text_input import TokenId, form_of, listed
from catalogue import TextModelEntry
from protocol.errors import InvalidRequest
from protocol.jobs import CHARACTERS_OF_A_TOKEN, CompletionJob

MAX_PROMPTS = 128
MAX_PROMPT_TOKENS = 2**20
MAX_CHOICES = 1024
"""Of all prompts together."""
MAX_ECHOED = 2**20
"""Tokens of echoed prompts in an answer, each counted for all choices, and again for itself and for each
alternative that `logprobs` adds. A small request would otherwise make gigabytes."""
DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "best_of": (1,),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "use_beam_search": (False,),
}
"""Fields that are not supported, and their values that request nothing; any other is refused by `to_jobs`."""


def _unsupported(name: str) -> Any:
    return WithJsonSchema({"enum": [None, *_UNSUPPORTED[name]]})


_Tokens = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPT_TOKENS)]
_Prompt = Annotated[
    Annotated[StrictStr, Tag("text")]
    | Annotated[list[StrictStr], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS), Tag("texts")]
    | Annotated[_Tokens, Tag("tokens")]
    | Annotated[
        list[_Tokens], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS), Tag("token lists")
    ],
    Discriminator(form_of),
]


class CompletionRequest(SamplingFields):
    """The body.

    `logprobs`: the number of alternatives to report for each token, of the prompt too with `echo`.
    """

    model_config = ConfigDict(
        extra="ignore", protected_namespaces=(), json_schema_extra=stream_options_need_stream
    )

    model: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    prompt: _Prompt
    max_tokens: Annotated[StrictInt, Field(ge=0, le=2**31)] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: StrictBool | None = None
    add_special_tokens: StrictBool | None = None

    # refused by `to_jobs` unless the value requests nothing
    suffix: Annotated[Any, _unsupported("suffix")] = None
    best_of: Annotated[Any, _unsupported("best_of")] = None
    prompt_logprobs: Annotated[Any, _unsupported("prompt_logprobs")] = None
    prompt_embeds: Annotated[Any, _unsupported("prompt_embeds")] = None
    use_beam_search: Annotated[Any, _unsupported("use_beam_search")] = None

    def to_jobs(self, request_id: str, entry: TextModelEntry) -> list[CompletionJob]:
        """Make a job for each prompt. Raises InvalidRequest and UnsupportedParameter."""
        self.refuse_unsupported(_UNSUPPORTED, entry.name)
        prompts = listed(self.prompt)
        if len(prompts) * (self.n or 1) > MAX_CHOICES:
            raise InvalidRequest(
                f"n must be at most {MAX_CHOICES // len(prompts)} for {len(prompts)} prompts", param="n"
            )
        self._check_echo(prompts)
        sampling = self.sampling(
            entry.defaults,
            max_tokens=DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
            logprobs=self.logprobs,
        )
        output_format = self.output_format()
        return [
            CompletionJob(
                id=request_id if len(prompts) == 1 else f"{request_id}-{place}",
                model=entry.name,
                prompt=prompt,
                # an error after the first token can't change the status of a stream
                checked=list(prompts[1:]) if self.stream and place == 0 else [],
                sampling=sampling,
                add_special_tokens=self.add_special_tokens is not False,
                echo=bool(self.echo),
                output_format=output_format,
            )
            for place, prompt in enumerate(prompts)
        ]

    def _check_echo(self, prompts: Sequence[str | list[int]]) -> None:
        """Raise InvalidRequest if the prompts that the answer repeats are too long."""
        if not self.echo:
            return
        tokens = sum(
            ceil(len(part) / CHARACTERS_OF_A_TOKEN) if isinstance(part, str) else len(part)
            for part in prompts
        )
        each = 1 if self.logprobs is None else 2 + self.logprobs
        if (echoed := tokens * (self.n or 1) * each) > MAX_ECHOED:
            raise InvalidRequest(
                f"the answer would repeat about {echoed:,} tokens of prompts and alternatives; echo allows"
                f" {MAX_ECHOED:,} (tokens * n * (2 + logprobs), without logprobs tokens * n)",
                param="echo",
            )
