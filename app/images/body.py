"""The bodies of image requests: JSON as the standard has it, and multipart forms as the node and OpenAI send
them.

They are read in two steps, so that a body is validated before anything is downloaded for it:
`read_image_body` separates the fields from the image files, `ImageBody.attach` loads and checks the files.
"""

import base64
import binascii
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import msgspec
from flask import Request
from gevent import get_hub, monkey
from werkzeug.datastructures import MultiDict
from werkzeug.formparser import FormDataParser

from app.http.request_body import read_body, read_json
from app.images.schema import ABSENT_AS_ZERO
from catalogue import EDIT, GENERATION, ImageModelEntry, TaskSpec
from protocol.errors import InvalidImage, InvalidRequest, PayloadTooLarge
from protocol.image_files import MAX_BYTES, open_image
from protocol.jobs import ImageJob

_TEXT_BYTES = 1024 * 1024
"""For all parts of a body that are not image files."""
MAX_FORM_BYTES = 2 * MAX_BYTES + _TEXT_BYTES
MAX_JSON_BYTES = 2 * (MAX_BYTES * 4 // 3 + 4) + _TEXT_BYTES
_MAX_FORM_PARTS = 200

Fetch = Callable[[str, str], bytes]
"""Downloads a URL, given for the named field (app.images.fetch.ImageFetcher.fetch)."""
_P = ParamSpec("_P")
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
        image = _load(self.image, "image", fetch)
        return image, None if self.mask is None else _load(self.mask, "mask", fetch)


def read_image_body(request: Request, *, edit: bool) -> ImageBody:
    """Read a body. `edit` tells the endpoint; a form with an image is an edit at either.

    Raises InvalidRequest, PayloadTooLarge, RequestTimeout.
    """
    if request.mimetype == "multipart/form-data":
        return _from_form(request, edit)
    fields = read_json(request, MAX_JSON_BYTES)
    if not edit:
        return ImageBody(GENERATION, fields, is_form=False)
    image, mask = (_one_text(fields.pop(name, None), name) for name in ("image", "mask"))
    return ImageBody(EDIT, fields, False, image, mask)


def _from_form(request: Request, edit: bool) -> ImageBody:
    form, files = _parse_form(request)
    image, mask = (_one_part(name, form, files) for name in ("image", "mask"))
    is_edit = edit or image is not None or mask is not None
    return ImageBody(EDIT if is_edit else GENERATION, _form_fields(form), True, image, mask)


def _parse_form(request: Request) -> tuple[MultiDict[str, str], MultiDict[str, Any]]:
    # read whole, with the bounds that every body has; werkzeug by itself would write large files to disk
    body = read_body(request, MAX_FORM_BYTES)
    parser = FormDataParser(
        stream_factory=lambda *_, **__: BytesIO(),
        max_form_memory_size=_TEXT_BYTES,
        max_form_parts=_MAX_FORM_PARTS,
        silent=False,
    )
    try:
        _, form, files = parser.parse(BytesIO(body), request.mimetype, len(body), request.mimetype_params)
    except ValueError as error:
        raise InvalidRequest("the body is not a valid multipart form as its Content-Type says") from error
    return form, files


def _form_fields(form: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields that are no files. Empty ones are absent, since a form may send every field it has;
    so is 0 where it is in JSON (app.images.schema)."""
    files = ("image", "image[]", "mask")
    return {
        name: value
        for name, value in form.items()
        if name not in files and value and not (name in ABSENT_AS_ZERO and value.strip() == "0")
    }


def _one_part(name: str, form: MultiDict[str, str], files: MultiDict[str, Any]) -> bytes | str | None:
    """Return an image sent as a file, or as text (a URL or base64), which some clients send."""
    found: list[bytes | str] = [
        file.stream.read() for key in (name, f"{name}[]") for file in files.getlist(key)
    ]
    found += [text for key in (name, f"{name}[]") for text in form.getlist(key)]
    return _at_most_one([part for part in found if part], name)


def _one_text(value: object, param: str) -> str | None:
    """Return an image in JSON: a string, or a list of one string as OpenAI's clients may send it."""
    values = value if isinstance(value, list) else [value]
    given = [value for value in values if value is not None and value != ""]
    texts = [value for value in given if isinstance(value, str)]
    if len(texts) != len(given):
        raise InvalidRequest(f"{param} must be a string: an http(s) URL, a data: URL or base64", param=param)
    return _at_most_one(texts, param)


def _at_most_one(values: list[_T], param: str) -> _T | None:
    if len(values) > 1:
        raise InvalidRequest(f"{param} was sent {len(values)} times; send one image", param=param)
    return values[0] if values else None


def _load(source: bytes | str, param: str, fetch: Fetch) -> bytes:
    if isinstance(source, str):
        source = source.strip()
        is_link = source[:8].lower().startswith(("http://", "https://"))
        source = fetch(source, param) if is_link else _off_loop(_decode_base64, source, param)
    if len(source) > MAX_BYTES:
        raise PayloadTooLarge(
            f"{param} has {len(source)} bytes; at most {MAX_BYTES} are accepted", param=param
        )
    # Pillow decompresses text chunks, profiles and EXIF with the header: up to a second for hostile files
    _off_loop(open_image, source, param)
    return source


def _decode_base64(text: str, param: str) -> bytes:
    """Decode a data: URL or plain base64. White space and missing padding are accepted."""
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InvalidImage(
                f"{param} is a data: URL without base64; send data:image/png;base64,...", param=param
            )
    packed = "".join(text.split())
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidImage(f"{param} must be an http(s) URL, a data: URL or base64", param=param) from None


def _off_loop(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run a function that takes CPU time in gevent's thread pool, so that it does not delay other requests.

    Without gevent it runs in the current thread, which delays nobody.
    """

    def attempt() -> tuple[_T, None] | tuple[None, Exception]:
        try:
            return function(*args, **kwargs), None
        except Exception as error:  # returned, because gevent prints exceptions that leave its threads
            return None, error

    if not monkey.is_module_patched("threading"):
        return function(*args, **kwargs)
    result, error = get_hub().threadpool.apply(attempt)
    if error is not None:
        raise error
    return cast("_T", result)
