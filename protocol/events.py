"""What a worker answers: the whole contract of the event stream on one screen.

A request's events are numbered from 0 without gaps; the last is `Finished` or `Failed` and there is exactly one.
"""

import msgspec

from protocol.errors import ServiceError


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Tokens counted by the engine. `cached_tokens`: the part of the prompt whose KV was not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One alternative token: its text, its bytes (a token may be half a character) and its natural log probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The chosen token, as TopLogprob, and the best alternatives, best first."""

    token: str
    logprob: float
    bytes: list[int]
    top: list[TopLogprob] = []


class Started(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """A worker has claimed the request. `incarnation_id` names the incarnation whose lease now stands for it."""

    incarnation_id: str


class Delta(msgspec.Struct, frozen=True, array_like=True, tag="d"):
    """Text that choice `index` gained; `tokens` of it. The choice's last delta carries `finish_reason`.

    `finish_reason`: "stop" or "length". `stop_reason`: id of the stop token, the stop string, or None.
    """

    text: str
    index: int = 0
    tokens: int = 1
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None


class Progress(msgspec.Struct, frozen=True, array_like=True, tag="p"):
    """Denoising step `step` of `total` is done (1-based)."""

    step: int
    total: int


class ImageReady(msgspec.Struct, frozen=True, array_like=True, tag="i"):
    """Picture `index` of the request. The engine fills `png`; on the wire it is empty and `name` finds it in the store."""

    index: int
    seed: int
    width: int
    height: int
    png: bytes = b""
    name: str = ""


class Finished(msgspec.Struct, frozen=True, array_like=True, tag="f"):
    """Everything was sent. `usage` is None for pictures."""

    usage: Usage | None = None


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="x"):
    """The request failed: an error of protocol.errors on its way. `message` is fit for the client's eyes."""

    code: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: ServiceError) -> "Failed":
        """The event that stands for `error`; `protocol.errors.from_code` is the reverse."""
        return cls(error.code, error.message, error.param)


Event = Started | Delta | Progress | ImageReady | Finished | Failed


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """An event on its way: whose it is and its place in that request's stream."""

    request_id: str
    seq: int
    event: Event


def is_terminal(event: Event) -> bool:
    """True for the one event that ends a request."""
    return isinstance(event, Finished | Failed)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Envelope)
_batch_decoder = msgspec.json.Decoder(list[Envelope])

encode = _encoder.encode
"""An Envelope, or a list of them, as JSON bytes."""


def decode(data: bytes) -> Envelope:
    """One envelope, as it stands in a replay list."""
    return _decoder.decode(data)


def decode_batch(data: bytes) -> list[Envelope]:
    """The envelopes of one published message: what all requests of one web process gained in one step."""
    return _batch_decoder.decode(data)
