"""What the web process asks of a worker. The HTTP schemas in app/ are validated and turned into these.

A job is stored in Redis as JSON (`encode`, `decode`); images are stored beside it as raw bytes.
"""

from typing import Any, Literal

import msgspec

from catalogue import CHAT, COMPLETION, EMBEDDING, GENERATION

FUNCTION_NAME = r"^[A-Za-z0-9_.:/-]{1,128}$"
"""The name of a tool, which requests send and models write."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are sampled. None: as the model's generation config says, if it does.

    `temperature` 0 is greedy. `stop` strings end the text and are not returned. `logprobs` is the number of
    alternatives to report for each token (0: the sampled one alone), None: no report.
    """

    max_tokens: int = 2048
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None


class OutputFormat(msgspec.Struct, frozen=True, kw_only=True):
    """What the text of an answer must be. `param` is the field of the request that asked for it.

    `text`, by `kind`: a JSON Schema, a regular expression, a JSON list of strings, or a grammar in the syntax
    of Lark.
    """

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text: str
    param: str


class ChatImage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An image in the messages of a chat: a PNG, JPEG or WEBP file of which the web process has checked the
    header.

    `param` is its place in the request's body.
    """

    data: bytes = b""
    detail: Literal["auto", "low", "high"] = "auto"
    param: str = ""


class ChatJob(msgspec.Struct, frozen=True, kw_only=True, tag=CHAT.job, omit_defaults=True):
    """One chat completion.

    The `content` of each message is a string: the web process joins its parts. That of a message with images
    is a list of parts of the types `text` and `image`; `images` are those of all messages, in order. `tools`
    are OpenAI's objects, and empty if the model must not call any. `strict_tools`: names of those whose
    arguments must be as their schema says. `required_tools`: names of those of which one must be called; none
    if an answer may do without.
    """

    id: str
    model: str
    messages: list[dict[str, Any]]
    sampling: SamplingParams
    chat_template_kwargs: dict[str, Any] = {}
    continue_final_message: bool = False
    reasoning_effort: str | None = None
    tools: list[dict[str, Any]] = []
    strict_tools: list[str] = []
    required_tools: list[str] = []
    parallel_tool_calls: bool = True
    output_format: OutputFormat | None = None
    wallet_sha256: str | None = None
    """Hash of the field `wallet` that the node sends for its user; for receipts."""
    traceparent: str | None = None
    """The span of its request (W3C Trace Context); for traces."""
    images: list[ChatImage] = []
    resumable: bool = False
    """Whether the request goes on for a while without a client (protocol/resumable_streams.py)."""


class CompletionJob(msgspec.Struct, frozen=True, kw_only=True, tag=COMPLETION.job, omit_defaults=True):
    """The continuation of one prompt, a text or tokens, without a chat template.

    `add_special_tokens`: whether a text gets the tokens that the tokenizer puts around one. `echo`: whether
    the answer begins with the prompt; `sampling.logprobs` then counts for the prompt too.
    `sampling.max_tokens` may be 0. `checked`: other prompts of the request, which have jobs of their own and
    are validated with this one.
    """

    id: str
    model: str
    prompt: str | list[int]
    sampling: SamplingParams
    checked: list[str | list[int]] = []
    add_special_tokens: bool = True
    echo: bool = False
    output_format: OutputFormat | None = None
    wallet_sha256: str | None = None
    traceparent: str | None = None


class TokenizeJob(msgspec.Struct, frozen=True, kw_only=True, tag="tokenize", omit_defaults=True):
    """The tokens of `text`, or of the prompt that the chat template makes of `chat`.

    `with_strings`: whether the answer has each token as the vocabulary spells it, too.
    """

    id: str
    model: str
    text: str = ""
    add_special_tokens: bool = True
    chat: ChatJob | None = None
    add_generation_prompt: bool = True
    with_strings: bool = False
    wallet_sha256: str | None = None
    traceparent: str | None = None


class DetokenizeJob(msgspec.Struct, frozen=True, kw_only=True, tag="detokenize", omit_defaults=True):
    """The text of tokens."""

    id: str
    model: str
    tokens: list[int]
    wallet_sha256: str | None = None
    traceparent: str | None = None


class ImageJob(msgspec.Struct, frozen=True, kw_only=True, tag=GENERATION.job, omit_defaults=True):
    """One image generation or edit. Sizes in pixels; None: the pipeline's own default.

    `image` and `mask` are the client's files as bytes (PNG, JPEG or WEBP), of which the web process has
    checked the header. White pixels of the mask, or transparent ones if it has an alpha channel, are
    edited. `partial_images`: how many previews to send of each image while it is made.
    """

    id: str
    model: str
    task: Literal["generation", "edit"]
    prompt: str
    negative_prompt: str | None = None
    n: int = 1
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    strength: float | None = None
    seed: int | None = None
    partial_images: int = 0
    wallet_sha256: str | None = None
    traceparent: str | None = None
    image: bytes | None = None
    mask: bytes | None = None


class EmbeddingJob(msgspec.Struct, frozen=True, kw_only=True, tag=EMBEDDING.job, omit_defaults=True):
    """A vector for each input, a text or the model's own tokens.

    `dimensions`: numbers of a vector, None: all that the model gives. `truncate_prompt_tokens`: tokens to
    which longer inputs are cut, -1: the model's limit, None: they are refused.
    """

    id: str
    model: str
    inputs: list[str | list[int]]
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None
    wallet_sha256: str | None = None
    traceparent: str | None = None


TextJob = ChatJob | CompletionJob
"""A job that generates text."""

Job = TextJob | TokenizeJob | DetokenizeJob | ImageJob | EmbeddingJob

USUAL_STEPS = 30
USUAL_SIDE = 1024
CHARACTERS_OF_A_TOKEN = 4


def work_of(job: Job) -> float:
    """How much work a job is beside others of its model: choices of a text, images x steps x megapixels, or
    tokens.

    A job for the tokenizer alone is none. Only ratios within one model count. What a request leaves to the
    pipeline counts as USUAL_STEPS and USUAL_SIDE.
    """
    if isinstance(job, TextJob):
        return float(job.sampling.n)
    if isinstance(job, EmbeddingJob):
        return sum(len(part) / (CHARACTERS_OF_A_TOKEN if isinstance(part, str) else 1) for part in job.inputs)
    if not isinstance(job, ImageJob):
        return 0.0
    pixels = (job.width or USUAL_SIDE) * (job.height or USUAL_SIDE)
    return job.n * (job.num_inference_steps or USUAL_STEPS) * pixels / 2**20


_IMAGE_FILES = ("image", "mask")
_CHAT_FILE = "image."
"""Followed by the number of an image in the messages."""

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Job)


def encode(job: Job) -> tuple[bytes, dict[str, bytes]]:
    """Return a job as JSON, and the images to store beside it by field name."""
    files: dict[str, bytes] = {}
    if isinstance(job, ChatJob):
        files = {f"{_CHAT_FILE}{number}": image.data for number, image in enumerate(job.images)}
        empty = [msgspec.structs.replace(image, data=b"") for image in job.images]
        job = msgspec.structs.replace(job, images=empty) if empty else job
    elif isinstance(job, ImageJob):
        files = {name: data for name in _IMAGE_FILES if (data := getattr(job, name)) is not None}
        job = msgspec.structs.replace(job, image=None, mask=None)
    return _encoder.encode(job), files


def decode(body: bytes, files: dict[str, bytes]) -> Job:
    """The reverse of `encode`. Raises msgspec.ValidationError for a job of another version."""
    job: Job = _decoder.decode(body)
    if isinstance(job, ChatJob):
        images = [
            msgspec.structs.replace(image, data=files[f"{_CHAT_FILE}{number}"])
            for number, image in enumerate(job.images)
        ]
        return msgspec.structs.replace(job, images=images) if images else job
    return msgspec.structs.replace(job, **files) if files else job


def is_file(field: str) -> bool:
    """Whether a field of a stored job is one of its files."""
    return field in _IMAGE_FILES or field.startswith(_CHAT_FILE)
