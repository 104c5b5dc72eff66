"""What a worker sends to the web process: the whole contract of the event stream.

A request's events are numbered from 0 without gaps. The last one, and no other, is a `Finished` or a
`Failed`.
"""

import logging
from collections.abc import Iterable

import msgspec

from protocol.errors import ServiceError
from protocol.versions import log_once

log = logging.getLogger(__name__)


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Tokens as the engine counts them.

    `cached_tokens`: prompt tokens that were in the prefix cache. `reasoning_tokens`: completion tokens that
    are reasoning; None for a model that doesn't reason.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int | None = None

    def plus(self, other: "Usage | None") -> "Usage":
        """Return the sum for requests of models that don't reason."""
        if other is None:
            return self
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
        )


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One alternative token: its text, its natural log probability and its bytes.

    The bytes are needed because a token can be a part of a character.
    """

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token, with the fields of TopLogprob, and the most probable alternatives.

    `logprob`: None for the first token of a prompt, which follows nothing.
    """

    token: str
    logprob: float | None
    bytes: list[int]
    top: list[TopLogprob] = []


class Started(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """A worker has claimed the request. When the lease of `incarnation_id` is gone, so is the request."""

    incarnation_id: str


class Delta(msgspec.Struct, frozen=True, array_like=True, tag="d"):
    """New text of choice `index`, made of `tokens` tokens. The choice's last delta has a `finish_reason`.

    `finish_reason`: "stop", "length" or "tool_calls". `stop_reason`: the id of the stop token, the stop
    string, or None.
    """

    text: str
    index: int = 0
    tokens: int = 1
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None


class Echo(msgspec.Struct, frozen=True, array_like=True, tag="e"):
    """The prompt, at the beginning of choice `index`: its whole text first, then the logprobs of its tokens
    in order.

    The engine sends it for choice 0, and it goes for all choices.
    """

    text: str
    index: int = 0
    logprobs: list[TokenLogprob] | None = None


class Tokens(msgspec.Struct, frozen=True, array_like=True, tag="n"):
    """What the tokenizer makes of a text. `strings`: the tokens as its vocabulary spells them, if asked for.

    `max_model_len`: limit of prompt and answer together, in tokens.
    """

    ids: list[int]
    strings: list[str] | None
    max_model_len: int


class Text(msgspec.Struct, frozen=True, array_like=True, tag="w"):
    """The text of tokens."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True, array_like=True, tag="r"):
    """New text of the reasoning before the content of choice `index`, made of `tokens` tokens."""

    text: str
    index: int = 0
    tokens: int = 1
    logprobs: list[TokenLogprob] | None = None


class ToolCallDelta(msgspec.Struct, frozen=True, array_like=True, tag="t"):
    """A part of call number `call` of choice `index`, made of `tokens` tokens.

    The first part of a call has `id` and `name`, the others add to its `arguments`, JSON as text.
    """

    call: int
    index: int = 0
    tokens: int = 1
    logprobs: list[TokenLogprob] | None = None
    id: str = ""
    name: str = ""
    arguments: str = ""


class Progress(msgspec.Struct, frozen=True, array_like=True, tag="p"):
    """`step` of the request's `total` denoising steps are done, counted over all of its images."""

    step: int
    total: int


class ImagePreview(msgspec.Struct, frozen=True, array_like=True, tag="b"):
    """Preview `number`, from 0, of image `index` of the request: a JPEG file of the image's size.

    The engine sets `jpeg`; when sent, it has a `name` in the store instead, "" if there was no room for it.
    None comes after the ImageReady of its image.
    """

    index: int
    number: int
    width: int
    height: int
    jpeg: bytes = b""
    name: str = ""


class ImageReady(msgspec.Struct, frozen=True, array_like=True, tag="i"):
    """Image `index` of the request.

    The engine sets `png`; when sent, it has a `name` in the store instead.
    """

    index: int
    seed: int
    width: int
    height: int
    png: bytes = b""
    name: str = ""


class Vectors(msgspec.Struct, frozen=True, array_like=True, tag="v"):
    """The vectors of some inputs of an embedding request, which come in any order.

    `data` has those of `indices` one after another, as float32, little endian. In JSON it is base64.
    """

    indices: list[int]
    data: bytes


class Finished(msgspec.Struct, frozen=True, array_like=True, tag="f"):
    """The request is complete. `usage` is None for images."""

    usage: Usage | None = None


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="x"):
    """The request failed: an error of protocol.errors, with a `message` for the client."""

    code: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: ServiceError) -> "Failed":
        """Make the event that carries `error`; `protocol.errors.from_code` is the reverse."""
        return cls(error.code, error.message, error.param)


Event = (
    Started
    | Delta
    | ReasoningDelta
    | ToolCallDelta
    | Echo
    | Tokens
    | Text
    | Progress
    | ImagePreview
    | ImageReady
    | Vectors
    | Finished
    | Failed
)


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """An event with the request that it belongs to and its number in that request's stream."""

    request_id: str
    seq: int
    event: Event


def is_terminal(event: Event) -> bool:
    """Whether `event` ends its request."""
    return isinstance(event, Finished | Failed)


_WITH_TOKENS = (Delta, ReasoningDelta, ToolCallDelta)


def has_tokens(event: Event) -> bool:
    """Whether `event` carries tokens of an answer."""
    return isinstance(event, _WITH_TOKENS)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Envelope)
_batch_decoder = msgspec.json.Decoder(list[Envelope])
_raw_decoder = msgspec.json.Decoder(list[msgspec.Raw])

encode = _encoder.encode
"""Encode an Envelope, or a list of them, as JSON."""


def decode_batch(data: bytes) -> list[Envelope]:
    """Decode one published message, a list of envelopes.

    An envelope that this version can't read is left out: it must not keep back those of the other requests.
    Its own request then has a gap.
    """
    try:
        return _batch_decoder.decode(data)
    except msgspec.MsgspecError:
        return decode_readable(_raw_decoder.decode(data))


def decode_readable(entries: Iterable[bytes | msgspec.Raw]) -> list[Envelope]:
    """Decode the envelopes that this version can read, each by itself. Raises nothing."""
    found = []
    for entry in entries:
        try:
            found.append(_decoder.decode(entry))
        except msgspec.MsgspecError as error:
            log_once(log, "an event of another version is skipped: %s", error)
    return found
