"""Pictures in a request: the node's and OpenAI's multipart forms, the standard's JSON. The only place that knows both.

Reading has two steps, so that a body is validated before anything is downloaded for it: `read_image_request` takes the
body apart, `ImageRequest.attach` gets and judges the picture files.
"""

import base64
import binascii
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, cast

import msgspec
from flask import Request
from gevent import get_hub, monkey
from werkzeug.datastructures import MultiDict
from werkzeug.formparser import FormDataParser

from app.http.request_body import read_body, read_json
from app.images.schema import ABSENT_AS_ZERO
from protocol.errors import InvalidImage, InvalidRequest, PayloadTooLarge
from protocol.image_files import MAX_BYTES, open_image
from protocol.jobs import ImageJob

_TEXT_BYTES = 1024 * 1024
"""Of everything in a body that is no picture."""
MAX_FORM_BYTES = 2 * MAX_BYTES + _TEXT_BYTES
MAX_JSON_BYTES = 2 * (MAX_BYTES * 4 // 3 + 4) + _TEXT_BYTES
_MAX_FORM_PARTS = 200

Fetch = Callable[[str, str], bytes]
"""Downloads a URL for a field: app.images.fetch.ImageFetcher.fetch."""
_P = ParamSpec("_P")
_T = TypeVar("_T")


class ImageRequest(NamedTuple):
    """A picture request's body. `fields` are for app.images.schema, `strict` is what its `parse` wants with them."""

    task: Literal["generation", "edit"]
    fields: dict[str, Any]
    strict: bool | None
    image: bytes | str | None = None
    mask: bytes | str | None = None

    @property
    def is_form(self) -> bool:
        return self.strict is False

    def attach(self, job: ImageJob, fetch: Fetch) -> ImageJob:
        """The job with its pictures; a generation has none. Comes last, when all else was judged. Raises as `load`."""
        if self.task == "generation":
            return job
        image, mask = self.load(fetch)
        return msgspec.structs.replace(job, image=image, mask=mask)

    def load(self, fetch: Fetch) -> tuple[bytes, bytes | None]:
        """The files of an edit, headers judged. Raises InvalidRequest, InvalidImage, PayloadTooLarge, Overloaded."""
        if self.image is None:
            raise InvalidRequest("image is required: send the picture to edit", param="image")
        image = _load(self.image, "image", fetch)
        return image, None if self.mask is None else _load(self.mask, "mask", fetch)


def read_image_request(request: Request, *, edit: bool) -> ImageRequest:
    """Take a body apart; `edit` says which end point it came to. A form with a picture is an edit at either.

    Raises InvalidRequest, PayloadTooLarge, RequestTimeout.
    """
    if request.mimetype == "multipart/form-data":
        return _from_form(request, edit)
    fields = read_json(request, MAX_JSON_BYTES)
    if not edit:
        return ImageRequest("generation", fields, None)
    image, mask = (_one_text(fields.pop(name, None), name) for name in ("image", "mask"))
    return ImageRequest("edit", fields, None, image, mask)


def _from_form(request: Request, edit: bool) -> ImageRequest:
    form, files = _parse_form(request)
    image, mask = (_one_part(name, form, files) for name in ("image", "mask"))
    is_edit = edit or image is not None or mask is not None
    return ImageRequest("edit" if is_edit else "generation", _form_fields(form), False, image, mask)


def _parse_form(request: Request) -> tuple[MultiDict[str, str], MultiDict[str, Any]]:
    # read whole, with the bounds that every body has; werkzeug by itself would spool pictures to files on disk
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
        raise InvalidRequest("the body is not the multipart form that its Content-Type says") from error
    return form, files


def _form_fields(form: Mapping[str, str]) -> dict[str, Any]:
    """A form can't leave a number out but by leaving it empty; 0 counts as absent where it does in JSON."""
    pictures = ("image", "image[]", "mask")
    return {
        name: value
        for name, value in form.items()
        if name not in pictures and value and not (name in ABSENT_AS_ZERO and value.strip() == "0")
    }


def _one_part(name: str, form: MultiDict[str, str], files: MultiDict[str, Any]) -> bytes | str | None:
    """A picture as a file, or as text (a URL, base64) as some clients send it."""
    found: list[bytes | str] = [
        file.stream.read() for key in (name, f"{name}[]") for file in files.getlist(key)
    ]
    found += [text for key in (name, f"{name}[]") for text in form.getlist(key)]
    return _only([part for part in found if part], name)


def _one_text(value: object, param: str) -> str | None:
    values = value if isinstance(value, list) else [value]
    given = [value for value in values if value is not None and value != ""]
    texts = [value for value in given if isinstance(value, str)]
    if len(texts) != len(given):
        raise InvalidRequest(f"{param} must be a string: an http(s) URL, a data: URL or base64", param=param)
    return _only(texts, param)


def _only(values: list[_T], param: str) -> _T | None:
    if len(values) > 1:
        raise InvalidRequest(
            f"{param} came {len(values)} times; one picture can be edited at a time", param=param
        )
    return values[0] if values else None


def _load(source: bytes | str, param: str, fetch: Fetch) -> bytes:
    if isinstance(source, str):
        source = source.strip()
        is_link = source[:8].lower().startswith(("http://", "https://"))
        source = fetch(source, param) if is_link else _off_loop(_decode_base64, source, param)
    if len(source) > MAX_BYTES:
        raise PayloadTooLarge(f"{param} has {len(source)} bytes; at most {MAX_BYTES} are taken", param=param)
    # text chunks, colour profiles and EXIF are unpacked with the header: seldom, but up to a second for hostile ones
    _off_loop(open_image, source, param)
    return source


def _decode_base64(text: str, param: str) -> bytes:
    """Of a data: URL or bare base64; line breaks and missing padding are forgiven."""
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InvalidImage(
                f"{param} is a data: URL without base64; write data:image/png;base64,...", param=param
            )
    packed = "".join(text.split())
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidImage(f"{param} must be an http(s) URL, a data: URL or base64", param=param) from None


def _off_loop(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run what keeps a processor busy where it doesn't hold up other requests: gevent's own threads, if gevent rules."""

    def attempt() -> tuple[_T, None] | tuple[None, Exception]:
        try:
            return function(*args, **kwargs), None
        except Exception as error:  # returned: gevent prints what is raised in its threads
            return None, error

    if not monkey.is_module_patched("threading"):
        return function(*args, **kwargs)
    result, error = get_hub().threadpool.apply(attempt)
    if error is not None:
        raise error
    return cast("_T", result)
