"""Pictures in a request: both dialects, their bounds, and the judgement of headers."""

import base64
import subprocess
import sys
from collections.abc import Iterable
from io import BytesIO
from typing import Any

import pytest
from flask import Flask, request
from PIL import Image

from app.images.body import MAX_JSON_BYTES, ImageRequest, read_image_request
from protocol.errors import InvalidImage, InvalidRequest, PayloadTooLarge
from protocol.image_files import MAX_BYTES
from protocol.jobs import ImageJob

flask_app = Flask(__name__)


def picture(kind: str = "PNG", size: tuple[int, int] = (4, 4), **options: Any) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind, **options)
    return buffer.getvalue()


PNG = picture()


def no_fetch(url: str, param: str) -> bytes:
    raise AssertionError(f"fetched {url} for {param}")


def read(*, edit: bool = True, **body: Any) -> ImageRequest:
    with flask_app.test_request_context("/v1/images/edits", method="POST", **body):
        return read_image_request(request, edit=edit)


def form(edit: bool = True, **fields: Any) -> ImageRequest:
    """A multipart body; bytes become files as the node sends them."""
    return read(edit=edit, data=encoded(fields.items()), content_type="multipart/form-data; boundary=bound")


def encoded(fields: Iterable[tuple[str, Any]]) -> bytes:
    parts = b""
    for name, value in fields:
        parts += f'--bound\r\nContent-Disposition: form-data; name="{name}"'.encode()
        if isinstance(value, bytes):
            parts += b'; filename="p.bin"\r\nContent-Type: application/octet-stream'
        parts += b"\r\n\r\n" + (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
    return parts + b"--bound--\r\n"


def files_of(asked: ImageRequest) -> tuple[bytes, bytes | None]:
    return asked.load(no_fetch)


def test_the_nodes_form():
    asked = form(image=PNG, mask=picture("WEBP"), prompt="p", n="0", width="64", wallet="w", size="")
    assert asked.task == "edit" and asked.strict is False and asked.is_form
    assert asked.fields == {"prompt": "p", "width": "64", "wallet": "w"}
    assert files_of(asked) == (PNG, picture("WEBP"))


def test_openais_list_name_is_known():
    fields: dict[str, Any] = {"image[]": PNG, "prompt": "p"}
    assert files_of(form(**fields)) == (PNG, None)


def test_a_form_may_hold_the_picture_as_text():
    asked = form(image="https://h/p.png", prompt="p")
    assert asked.load(lambda url, param: PNG if (url, param) == ("https://h/p.png", "image") else b"") == (
        PNG,
        None,
    )


def test_a_form_with_a_picture_is_an_edit_at_the_generations_end_point():
    assert form(edit=False, image=PNG, prompt="p").task == "edit"
    assert form(edit=False, mask=PNG, prompt="p").task == "edit"
    plain = form(edit=False, prompt="p", n="2")
    assert (plain.task, plain.fields) == ("generation", {"prompt": "p", "n": "2"})


def test_json_at_the_generations_end_point_is_a_generation_whatever_it_holds():
    asked = read(edit=False, json={"prompt": "p", "image": "https://h/p.png"})
    assert asked.task == "generation" and asked.fields["image"] == "https://h/p.png"
    job = ImageJob(id="i", model="m", task="generation", prompt="p")
    assert asked.attach(job, no_fetch) is job


BASE64 = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "image",
    [
        BASE64,
        BASE64.rstrip("="),
        "\n".join(BASE64[at : at + 20] for at in range(0, len(BASE64), 20)),
        f"data:image/png;base64,{BASE64}",
        f"DATA:application/octet-stream;charset=x;BASE64,{BASE64}",
        [BASE64],
    ],
)
def test_json_pictures(image):
    asked = read(json={"prompt": "p", "image": image, "mask": BASE64})
    assert asked.strict is None and asked.fields == {"prompt": "p"}
    job = asked.attach(ImageJob(id="i", model="m", task="edit", prompt="p"), no_fetch)
    assert (job.image, job.mask) == (PNG, PNG)


@pytest.mark.parametrize("url", ["http://h/p.png", "HTTPS://h/p.png", " https://h/p "])
def test_json_urls_are_fetched(url):
    asked = read(json={"prompt": "p", "image": url})
    assert asked.load(lambda asked_url, param: PNG if asked_url == url.strip() else b"") == (PNG, None)


@pytest.mark.parametrize("body", [{}, {"image": None}, {"image": ""}, {"image": []}, {"image": [None]}])
def test_an_edit_needs_a_picture(body):
    with pytest.raises(InvalidRequest, match="image is required") as caught:
        files_of(read(json={"prompt": "p", **body}))
    assert caught.value.param == "image"


def test_a_form_without_picture_is_no_edit():
    with pytest.raises(InvalidRequest, match="image is required"):
        files_of(form(prompt="p", image=b""))


def test_several_pictures_are_refused_clearly():
    with pytest.raises(InvalidRequest, match="image came 2 times; one picture"):
        read(json={"prompt": "p", "image": [BASE64, BASE64]})
    two = encoded([("image", PNG), ("image", PNG)])
    with pytest.raises(InvalidRequest, match="image came 2 times") as caught:
        read(data=two, content_type="multipart/form-data; boundary=bound")
    assert caught.value.param == "image"


@pytest.mark.parametrize("image", [5, {"url": "x"}, [["x"]], True])
def test_a_picture_of_the_wrong_type(image):
    with pytest.raises(InvalidRequest, match="image must be a string"):
        read(json={"prompt": "p", "image": image})


@pytest.mark.parametrize(
    "image",
    [
        "file:///etc/passwd",
        "ftp://h/p.png",
        "data:image/png,x",
        "data:,",
        "no base64!",
        "é",
        "AAAAA",
        "javascript:x",
    ],
)
def test_text_that_is_no_picture(image):
    with pytest.raises(InvalidImage) as caught:
        files_of(read(json={"prompt": "p", "image": image}))
    assert caught.value.param == "image" and image not in caught.value.message


def animated() -> bytes:
    buffer = BytesIO()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def bomb() -> bytes:
    """13,000 x 13,000 pixels in half a megabyte: opens with a mere warning in Pillow."""
    buffer = BytesIO()
    Image.new("1", (13_000, 13_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"hello", "readable"),
        (b"\x89PNG\r\n\x1a\n", "readable"),
        (picture("GIF"), "readable"),
        (picture("BMP"), "readable"),
        (picture("TIFF"), "readable"),
        (b"%PDF-1.4", "readable"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "readable"),
        (animated(), "2 frames"),
        (bomb(), "too large"),
        (picture(size=(4097, 4096)), "too large"),
    ],
)
def test_headers_are_judged(data, word):
    for asked in (form(image=data, prompt="p"), read(json={"image": base64.b64encode(data).decode()})):
        with pytest.raises(InvalidImage, match=word) as caught:
            files_of(asked)
        assert caught.value.param == "image"
    with pytest.raises(InvalidImage, match="mask") as caught:
        files_of(form(image=PNG, mask=data, prompt="p"))
    assert caught.value.param == "mask"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_of_the_largest_size_are_taken(kind):
    data = picture(kind, size=(4096, 4096) if kind != "WEBP" else (16383, 1024))
    assert files_of(form(image=data, prompt="p"))[0] == data


def test_a_phones_jpeg_with_a_preview_behind_it_is_a_still_picture():
    data = picture("MPO", save_all=True, append_images=[Image.new("RGB", (2, 2))])
    assert files_of(form(image=data, prompt="p"))[0] == data


def test_bytes_are_bounded():
    large = PNG + b"\0" * (MAX_BYTES - len(PNG))
    assert len(files_of(form(image=large, mask=large, prompt="p"))[0]) == MAX_BYTES
    with pytest.raises(PayloadTooLarge) as caught:
        files_of(form(image=large + b"\0", prompt="p"))
    assert caught.value.param == "image"
    with pytest.raises(PayloadTooLarge):
        files_of(read(json={"image": base64.b64encode(large + b"\0").decode()}))
    with pytest.raises(PayloadTooLarge):
        read(data=b"x" * (MAX_JSON_BYTES + 1), content_type="application/json")
    with pytest.raises(PayloadTooLarge):
        form(image=b"x" * (2 * MAX_BYTES + 2**21))


@pytest.mark.parametrize(
    ("data", "content_type"),
    [
        (b"", "multipart/form-data; boundary=x"),
        (b"junk", "multipart/form-data; boundary=x"),
        (b"--x\r\n", "multipart/form-data; boundary=x"),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\n", "multipart/form-data; boundary=x"),
        (b"--x--", "multipart/form-data"),
        (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb', "multipart/form-data; boundary=x"),
    ],
)
def test_a_broken_form_is_a_clear_refusal(data, content_type):
    with pytest.raises(InvalidRequest):
        files_of(read(data=data, content_type=content_type))


UNDER_GEVENT = """
import gevent.monkey
gevent.monkey.patch_all()
import gevent, threading, time
from io import BytesIO
import app.images.body
from PIL import Image
from protocol.errors import InvalidImage
main = gevent.get_hub().thread_ident
seen, real = [], app.images.body.open_image
def judge(data, param):
    seen.append(gevent.monkey.get_original("threading", "get_ident")() != main)
    return real(data, param)
app.images.body.open_image = judge
buffer = BytesIO()
Image.new("RGB", (4, 4)).save(buffer, "PNG")
asked = app.images.body.ImageRequest("edit", {}, None, buffer.getvalue())
assert asked.load(None)[0] == buffer.getvalue()
try:
    asked._replace(image=b"broken").load(None)
except InvalidImage as error:
    assert error.param == "image"
    print(seen)
"""


def test_under_gevent_pictures_are_judged_off_the_loop():
    done = subprocess.run([sys.executable, "-c", UNDER_GEVENT], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[True, True]\n", "")
