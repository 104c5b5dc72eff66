"""app.images.body: image requests as forms and as JSON, their bounds, and the check of image headers."""

import base64
import subprocess
import sys
from collections.abc import Iterable
from io import BytesIO
from typing import Any

import pytest
from flask import Flask, request
from PIL import Image

from app.images.body import ImageBody, read_image_body
from catalogue import EDIT, GENERATION
from protocol.errors import InvalidImage, InvalidRequest, PayloadTooLarge
from protocol.image_files import MAX_BYTES
from protocol.jobs import ImageJob

flask_app = Flask(__name__)


def image_file(kind: str = "PNG", size: tuple[int, int] = (4, 4), **options: Any) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind, **options)
    return buffer.getvalue()


PNG = image_file()


def no_fetch(url: str, param: str) -> bytes:
    raise AssertionError(f"fetched {url} for {param}")


def read(*, edit: bool = True, **body: Any) -> ImageBody:
    with flask_app.test_request_context("/v1/images/edits", method="POST", **body):
        return read_image_body(request, request.get_data(), edit=edit)


def form(edit: bool = True, **fields: Any) -> ImageBody:
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


def files_of(body: ImageBody) -> tuple[bytes, bytes | None]:
    return body.load(no_fetch)


def test_the_form_that_the_node_sends():
    body = form(image=PNG, mask=image_file("WEBP"), prompt="p", n="0", width="64", wallet="w", size="")
    assert body.task is EDIT and body.is_form
    assert body.fields == {"prompt": "p", "width": "64", "wallet": "w"}
    assert files_of(body) == (PNG, image_file("WEBP"))


def test_the_list_name_of_openai_is_known():
    fields: dict[str, Any] = {"image[]": PNG, "prompt": "p"}
    assert files_of(form(**fields)) == (PNG, None)


def test_a_form_may_have_the_image_as_text():
    body = form(image="https://h/p.png", prompt="p")
    assert body.load(lambda url, param: PNG if (url, param) == ("https://h/p.png", "image") else b"") == (
        PNG,
        None,
    )


def test_a_form_with_an_image_is_an_edit_at_the_generations_endpoint():
    assert form(edit=False, image=PNG, prompt="p").task is EDIT
    assert form(edit=False, mask=PNG, prompt="p").task is EDIT
    plain = form(edit=False, prompt="p", n="2")
    assert (plain.task, plain.fields) == (GENERATION, {"prompt": "p", "n": "2"})


def test_json_without_an_image_is_a_generation_at_the_generations_endpoint():
    body = read(edit=False, json={"prompt": "p", "image": None, "mask": ""})
    assert body.task is GENERATION and body.fields == {"prompt": "p"}
    job = ImageJob(id="i", model="m", task="generation", prompt="p")
    assert body.attach(job, no_fetch) is job


@pytest.mark.parametrize("name", ["image", "file", "mask"])
def test_json_with_an_image_is_an_edit_at_the_generations_endpoint(name: str):
    body = read(edit=False, json={"prompt": "p", name: "https://h/p.png"})
    assert body.task is EDIT and body.fields == {"prompt": "p"}


def test_a_form_may_name_the_image_file():
    image, mask = files_of(form(edit=False, prompt="p", file=PNG))
    assert image == PNG and mask is None


def raw_form(*parts: tuple[str, bytes]) -> bytes:
    """A multipart body with these heads and contents."""
    joined = b"".join(b"--bound\r\n%s\r\n\r\n%s\r\n" % (head.encode(), content) for head, content in parts)
    return joined + b"--bound--\r\n"


PROMPT = ('Content-Disposition: form-data; name="prompt"', b"p")


@pytest.mark.parametrize(
    "head",
    [
        'Content-Disposition: form-data; filename="p.png"\r\nContent-Type: image/png',
        "Content-Disposition: form-data\r\nContent-Type: application/octet-stream",
        'Content-Disposition: form-data; name="image"\r\nContent-Type: image/png',
    ],
)
def test_a_part_without_name_or_filename_is_judged_by_its_type(head: str):
    data = raw_form(PROMPT, (head, PNG))
    body = read(data=data, content_type="multipart/form-data; boundary=bound")
    assert files_of(body) == (PNG, None) and body.fields == {"prompt": "p"}


def test_a_text_part_without_a_name_is_left_out():
    data = raw_form(PROMPT, ("Content-Disposition: form-data", b"text"))
    body = read(edit=False, data=data, content_type="multipart/form-data; boundary=bound")
    assert body.task is GENERATION and body.fields == {"prompt": "p"}


@pytest.mark.parametrize("name", ["image", "mask"])
def test_an_empty_file_is_refused_by_name(name: str):
    with pytest.raises(InvalidRequest, match=f"{name} is an empty file") as caught:
        fields: dict[str, Any] = {"prompt": "p", "image": PNG, name: b""}
        form(**fields)
    assert caught.value.param == name


def test_a_file_input_that_was_left_empty_is_absent():
    empty = (
        'Content-Disposition: form-data; name="mask"; filename=""\r\nContent-Type: application/octet-stream'
    )
    image = 'Content-Disposition: form-data; name="image"; filename="p.png"\r\nContent-Type: image/png'
    body = read(
        data=raw_form(PROMPT, (image, PNG), (empty, b"")), content_type="multipart/form-data; boundary=bound"
    )
    assert files_of(body) == (PNG, None)


def test_a_field_that_is_no_text_is_refused():
    data = raw_form(('Content-Disposition: form-data; name="prompt"', b"\xff\xfe"))
    with pytest.raises(InvalidRequest, match="not UTF-8") as caught:
        read(data=data, content_type="multipart/form-data; boundary=bound")
    assert caught.value.param == "prompt"


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
def test_images_in_json(image):
    body = read(json={"prompt": "p", "image": image, "mask": BASE64})
    assert not body.is_form and body.fields == {"prompt": "p"}
    job = body.attach(ImageJob(id="i", model="m", task="edit", prompt="p"), no_fetch)
    assert (job.image, job.mask) == (PNG, PNG)


@pytest.mark.parametrize("url", ["http://h/p.png", "HTTPS://h/p.png", " https://h/p "])
def test_json_urls_are_fetched(url):
    body = read(json={"prompt": "p", "image": url})
    assert body.load(lambda given_url, param: PNG if given_url == url.strip() else b"") == (PNG, None)


@pytest.mark.parametrize("body", [{}, {"image": None}, {"image": ""}, {"image": []}, {"image": [None]}])
def test_an_edit_requires_an_image(body):
    with pytest.raises(InvalidRequest, match="image is required") as caught:
        files_of(read(json={"prompt": "p", **body}))
    assert caught.value.param == "image"


def test_a_form_without_an_image_is_not_an_edit():
    with pytest.raises(InvalidRequest, match="image is required"):
        files_of(form(prompt="p", image=""))


def test_several_images_are_refused():
    with pytest.raises(InvalidRequest, match="image was sent 2 times; send one image"):
        read(json={"prompt": "p", "image": [BASE64, BASE64]})
    two = encoded([("image", PNG), ("image", PNG)])
    with pytest.raises(InvalidRequest, match="image was sent 2 times") as caught:
        read(data=two, content_type="multipart/form-data; boundary=bound")
    assert caught.value.param == "image"


@pytest.mark.parametrize("image", [5, {"url": "x"}, [["x"]], True])
def test_an_image_of_the_wrong_json_type(image):
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
def test_text_that_is_not_an_image(image):
    with pytest.raises(InvalidImage) as caught:
        files_of(read(json={"prompt": "p", "image": image}))
    assert caught.value.param == "image" and image not in caught.value.message


def animated() -> bytes:
    buffer = BytesIO()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def bomb() -> bytes:
    """13,000 x 13,000 pixels in half a megabyte: opens with only a warning in Pillow."""
    buffer = BytesIO()
    Image.new("1", (13_000, 13_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"hello", "readable"),
        (b"\x89PNG\r\n\x1a\n", "readable"),
        (image_file("GIF"), "readable"),
        (image_file("BMP"), "readable"),
        (image_file("TIFF"), "readable"),
        (b"%PDF-1.4", "readable"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "readable"),
        (animated(), "2 frames"),
        (bomb(), "too large"),
        (image_file(size=(4097, 4096)), "too large"),
    ],
)
def test_headers_are_checked(data, word):
    for body in (form(image=data, prompt="p"), read(json={"image": base64.b64encode(data).decode()})):
        with pytest.raises(InvalidImage, match=word) as caught:
            files_of(body)
        assert caught.value.param == "image"
    with pytest.raises(InvalidImage, match="mask") as caught:
        files_of(form(image=PNG, mask=data, prompt="p"))
    assert caught.value.param == "mask"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_of_the_largest_size_are_accepted(kind):
    data = image_file(kind, size=(4096, 4096) if kind != "WEBP" else (16383, 1024))
    assert files_of(form(image=data, prompt="p"))[0] == data


def test_a_jpeg_of_a_phone_with_a_preview_is_one_image():
    data = image_file("MPO", save_all=True, append_images=[Image.new("RGB", (2, 2))])
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
        form(image=PNG, prompt="x" * (2**20 + 1))


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
def test_a_broken_form_is_refused(data, content_type):
    with pytest.raises(InvalidRequest):
        files_of(read(data=data, content_type=content_type))


UNDER_GEVENT = """
import gevent.monkey
gevent.monkey.patch_all()
import gevent, threading, time
from io import BytesIO
import app.image_input.source
import app.images.body
from PIL import Image
from protocol.errors import InvalidImage
main = gevent.get_hub().thread_ident
seen, real = [], app.image_input.source.open_image
def check(data, param):
    seen.append(gevent.monkey.get_original("threading", "get_ident")() != main)
    return real(data, param)
app.image_input.source.open_image = check
buffer = BytesIO()
Image.new("RGB", (4, 4)).save(buffer, "PNG")
body = app.images.body.ImageBody(app.images.body.EDIT, {}, False, buffer.getvalue())
assert body.load(None)[0] == buffer.getvalue()
try:
    body._replace(image=b"broken").load(None)
except InvalidImage as error:
    assert error.param == "image"
    print(seen)
"""


def test_under_gevent_headers_are_checked_in_another_thread():
    done = subprocess.run([sys.executable, "-c", UNDER_GEVENT], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[True, True]\n", "")
