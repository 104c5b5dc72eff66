"""Chats with images through the whole service: web, Redis, a worker with a tiny random model that sees."""

import base64
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from PIL import Image

from tests.deployment import Deployment
from tests.engines.tiny_vision import FAMILIES, png

CATALOGUE = """
project = "Vision"
[[models]]
name = "eyes"
tasks = ["chat"]
weights = "{weights}"
[models.engine]
torch_threads = 1
max_images = 3
max_context = 512
[models.defaults]
temperature = 0.0
max_tokens = 8
"""


class Files(BaseHTTPRequestHandler):
    """Answers every path with the same image."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(png())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def files() -> Iterator[str]:
    """The host and port of a web server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, files: str) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("vision")
    weights = FAMILIES["qwen2_5_vl"].save(folder / "weights")
    catalogue = CATALOGUE.format(weights=weights)
    with Deployment(folder / "run", catalogue=catalogue, ALLOWED_IMAGE_HOSTS=files) as service:
        yield service.start("eyes")


@pytest.fixture(scope="module")
def client(service: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def question(*urls: str, role: str = "user") -> list[Any]:
    images = [{"type": "image_url", "image_url": {"url": url, "detail": "auto"}} for url in urls]
    return [{"role": role, "content": [*images, {"type": "text", "text": "What is it?"}]}]


def test_an_image_in_the_request_and_the_same_by_its_link(client: openai.OpenAI, files: str) -> None:
    answers = [
        client.chat.completions.create(model="eyes", messages=question(url))
        for url in (data_url(png()), f"http://{files}/a.png", data_url(png(seed=1)))
    ]
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts[0] == texts[1] != texts[2]
    text = client.chat.completions.create(model="eyes", messages=question())
    assert answers[0].usage and text.usage
    assert answers[0].usage.prompt_tokens > text.usage.prompt_tokens


def test_a_stream_with_several_images(client: openai.OpenAI) -> None:
    messages = question(data_url(png()), data_url(png(70, 30, 2)))
    plain = client.chat.completions.create(model="eyes", messages=messages)
    chunks = client.chat.completions.create(model="eyes", messages=messages, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content


def test_images_of_more_bytes_than_a_text_may_have(client: openai.OpenAI) -> None:
    urls = [data_url(png(1500, 1200, seed)) for seed in range(2)]
    assert sum(map(len, urls)) > 8 * 2**20
    answer = client.chat.completions.create(model="eyes", messages=question(*urls))
    assert answer.choices[0].finish_reason


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


REFUSED = {
    "a decompression bomb": (lambda: question(data_url(bomb())), "invalid_image", "messages.0.content.0"),
    "fifty images": (lambda: question(*[data_url(png())] * 50), "invalid_request", "messages.0.content.3"),
    "a damaged image": (lambda: question(data_url(png()[:-60])), "invalid_image", "messages.0.content.0"),
    "a link into the network": (
        lambda: question(data_url(png()), "http://127.0.0.1:1/a.png"),
        "invalid_image",
        "messages.0.content.1",
    ),
    "an image of the system": (
        lambda: question(data_url(png()), role="system"),
        "invalid_request",
        "messages.0.content.0",
    ),
}


@pytest.mark.parametrize(("messages", "code", "param"), REFUSED.values(), ids=REFUSED)
def test_hostile_images_are_refused_with_their_place(
    client: openai.OpenAI, messages: Any, code: str, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="eyes", messages=messages())
    assert (caught.value.code, caught.value.param) == (code, param)


def test_the_models_tell_what_they_take(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model.model_dump()["input_modalities"] == ["text", "image"]
