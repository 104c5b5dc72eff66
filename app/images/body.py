"""The bodies of image requests: JSON as the standard has it, and multipart forms as the node and OpenAI send
them.

They are read in two steps, so that a body is validated before anything is downloaded for it:
`read_image_body` separates the fields from the image files, `ImageBody.attach` loads and checks the files.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, cast

import msgspec
from flask import Request
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

from app.http.request_body import parse_json
from app.image_input.source import Fetch, load_image
from app.images.schema import ABSENT_AS_ZERO
from catalogue import EDIT, GENERATION, ImageModelEntry, TaskSpec
from protocol.errors import InvalidRequest, PayloadTooLarge
from protocol.image_files import MAX_BYTES
from protocol.jobs import ImageJob

_TEXT_BYTES = 1024 * 1024
"""For all parts of a body that are not image files."""
MAX_FORM_BYTES = 2 * MAX_BYTES + _TEXT_BYTES
MAX_JSON_BYTES = 2 * (MAX_BYTES * 4 // 3 + 4) + _TEXT_BYTES
_MAX_FORM_PARTS = 200
_IMAGE_NAMES = ("image", "image[]", "file")
"""The field of the image to edit. Nodes of AIL2-ComputeNet send it as `file`."""
_MASK_NAMES = ("mask", "mask[]")
_FILE_NAMES = _IMAGE_NAMES + _MASK_NAMES

_T = TypeVar("_T")


class ImageBody(NamedTuple):
    """A body: `fields` for app.images.schema, and `image` and `mask` as files, URLs or base64."""

    task: TaskSpec[ImageModelEntry]
    fields: dict[str, Any]
    is_form: bool
    image: bytes | str | None = None
    mask: bytes | str | None = None

    def attach(self, job: ImageJob, fetch: Fetch) -> ImageJob:
        """Return the job with its image files; that of a generation has none. Raises what `load` raises.

        Call this last, when everything else in the body has been validated.
        """
        if self.task is GENERATION:
            return job
        image, mask = self.load(fetch)
        return msgspec.structs.replace(job, image=image, mask=mask)

    def load(self, fetch: Fetch) -> tuple[bytes, bytes | None]:
        """Load the image and the mask of an edit and check their headers.

        Raises InvalidRequest, InvalidImage, PayloadTooLarge and Overloaded.
        """
        if self.image is None:
            raise InvalidRequest("image is required: send the image to edit", param="image")
        image = load_image(self.image, "image", fetch).data
        return image, None if self.mask is None else load_image(self.mask, "mask", fetch).data


def read_image_body(request: Request, body: bytes, *, edit: bool) -> ImageBody:
    """Take a body apart. `edit` tells the endpoint; a body with an image is an edit at either.

    Raises InvalidRequest.
    """
    if request.mimetype == "multipart/form-data":
        return _from_form(request, body, edit)
    fields = parse_json(body)
    image, mask = (_one_text(_pop(fields, names), names[0]) for names in (_IMAGE_NAMES, _MASK_NAMES))
    is_edit = edit or image is not None or mask is not None
    return ImageBody(EDIT if is_edit else GENERATION, fields, False, image, mask)


def _pop(fields: dict[str, Any], names: Sequence[str]) -> list[Any]:
    """Take the values of an image's field, under any of its names, out of a JSON body."""
    found: list[Any] = []
    for name in names:
        value = fields.pop(name, None)
        found += value if isinstance(value, list) else [value]
    return found


def _from_form(request: Request, body: bytes, edit: bool) -> ImageBody:
    parts = _parse_form(request, body)
    image, mask = (_one_part(names, parts) for names in (_IMAGE_NAMES, _MASK_NAMES))
    is_edit = edit or image is not None or mask is not None
    return ImageBody(EDIT if is_edit else GENERATION, _form_fields(parts), True, image, mask)


class _Part(NamedTuple):
    """A part of a form.

    `filename` is None for a field; browsers send "" for a file input that was left empty.
    """

    name: str
    filename: str | None
    content: bytes

    @property
    def is_empty_input(self) -> bool:
        return not self.content and not self.filename


def _parse_form(request: Request, body: bytes) -> list[_Part]:
    """The parts of a multipart form.

    One without a name is an image if its type says so, and else left out.
    """
    boundary = request.mimetype_params.get("boundary", "").encode("latin-1", "replace")
    if not boundary:
        raise InvalidRequest("the Content-Type of a multipart form needs a boundary")
    decoder = MultipartDecoder(boundary, max_form_memory_size=None, max_parts=_MAX_FORM_PARTS)
    parts: list[_Part] = []
    head: Field | File | None = None
    content: list[bytes] = []
    try:
        decoder.receive_data(body)
        decoder.receive_data(None)
        while not isinstance(event := decoder.next_event(), Epilogue | NeedData):
            if isinstance(event, Field | File):
                head, content = event, []
            elif isinstance(event, Data) and head is not None:
                content.append(event.data)
                if not event.more_data:
                    parts += _part(head, b"".join(content))
    except (ValueError, RequestEntityTooLarge) as error:
        raise InvalidRequest("the body is not a valid multipart form as its Content-Type says") from error
    if sum(len(part.content) for part in parts if part.name not in _FILE_NAMES) > _TEXT_BYTES:
        raise PayloadTooLarge(f"the fields of the form have more than {_TEXT_BYTES} bytes")
    return parts


def _part(head: Field | File, content: bytes) -> list[_Part]:
    kind = head.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    filename = head.filename if isinstance(head, File) else None
    is_file = filename is not None or kind.startswith("image/") or kind == "application/octet-stream"
    name = cast("str | None", head.name)
    if name:
        return [_Part(name, filename if filename is not None else kind if is_file else None, content)]
    return [_Part("image", filename or "image", content)] if is_file else []


def _form_fields(parts: Sequence[_Part]) -> dict[str, Any]:
    """Return the fields that are no files. Empty ones are absent, since a form may send every field it has;
    so is 0 where it is in JSON (app.images.schema). Of a repeated field the first counts."""
    fields: dict[str, Any] = {}
    for part in parts:
        if part.name in _FILE_NAMES or part.name in fields:
            continue
        value = _text(part)
        if value and not (part.name in ABSENT_AS_ZERO and value.strip() == "0"):
            fields[part.name] = value
    return fields


def _text(part: _Part) -> str:
    try:
        return part.content.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("a field of the form is not UTF-8 text", param=_shown(part.name)) from None


def _shown(name: str) -> str | None:
    return name if name.isidentifier() and len(name) <= 64 else None


def _one_part(names: Sequence[str], parts: Sequence[_Part]) -> bytes | str | None:
    """Return an image sent as a file, or as text (a URL or base64), which some clients send."""
    given = [part for part in parts if part.name in names and not part.is_empty_input]
    part = _at_most_one(given, names[0])
    if part is None:
        return None
    if not part.content:
        raise InvalidRequest(f"{names[0]} is an empty file", param=names[0])
    return part.content if part.filename is not None else _text(part)


def _one_text(values: list[Any], param: str) -> str | None:
    """Return an image in JSON: a string, or a list of one string as OpenAI's clients may send it."""
    given = [value for value in values if value is not None and value != ""]
    texts = [value for value in given if isinstance(value, str)]
    if len(texts) != len(given):
        raise InvalidRequest(f"{param} must be a string: an http(s) URL, a data: URL or base64", param=param)
    return _at_most_one(texts, param)


def _at_most_one(values: list[_T], param: str) -> _T | None:
    if len(values) > 1:
        raise InvalidRequest(f"{param} was sent {len(values)} times; send one image", param=param)
    return values[0] if values else None
