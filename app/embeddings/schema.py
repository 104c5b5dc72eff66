"""The body of POST /v1/embeddings, with OpenAI's fields and vLLM's `truncate_prompt_tokens`, and its job."""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictInt,
    StrictStr,
    Tag,
)

from app.http.validation import first_given
from app.text_input import TokenId, form_of, listed
from catalogue import EmbeddingModelEntry
from protocol.errors import InvalidRequest
from protocol.jobs import EmbeddingJob

MAX_INPUTS = 2048
"""OpenAI's."""
MAX_CHARACTERS = 2**20
"""Of a text. Tokenizing takes a second for some millions, and a model's limit is a few thousand tokens."""
MAX_TOKENS = 2**19


def _check_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain the character NUL")
    return text


# fail_fast, here and below: a million invalid items must not become a million errors
_Text = Annotated[
    StrictStr,
    Field(min_length=1, max_length=MAX_CHARACTERS, json_schema_extra={"pattern": r"^[^\u0000]*$"}),
    AfterValidator(_check_text),
]
_Tokens = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_TOKENS)]
_Input = Annotated[
    Annotated[_Text, Tag("text")]
    | Annotated[list[_Text], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS), Tag("texts")]
    | Annotated[_Tokens, Tag("tokens")]
    | Annotated[
        list[_Tokens], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS), Tag("token lists")
    ],
    Discriminator(form_of),
]


class EmbeddingRequest(BaseModel):
    """The body. None means not given: the catalogue's default applies."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    input: Annotated[_Input, Field(description="a text, tokens of the model, or a list of either")]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None
    truncate_prompt_tokens: Annotated[StrictInt, Field(ge=-1)] | None = None
    user: StrictStr | None = None

    def to_job(self, request_id: str, entry: EmbeddingModelEntry) -> EmbeddingJob:
        """Make the job. Raises InvalidRequest."""
        inputs = listed(self.input)
        if sum(len(part) for part in inputs if isinstance(part, list)) > MAX_TOKENS:
            raise InvalidRequest(
                f"input must have at most {MAX_TOKENS} tokens in all lists together", param="input"
            )
        return EmbeddingJob(
            id=request_id,
            model=entry.name,
            inputs=list(inputs),
            dimensions=self.dimensions,
            truncate_prompt_tokens=first_given(
                self.truncate_prompt_tokens, entry.defaults.truncate_prompt_tokens
            ),
        )
