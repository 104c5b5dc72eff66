"""Where the bytes of images are: links expire, the store is bounded, and edits wait in Redis alone."""

import base64
import io
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
from PIL import Image

from tests.deployment import ECHO_CATALOGUE, Deployment, wait_until


def status_of(service: Deployment, path: str) -> int:
    """Request an image link and return the status."""
    response, connection = service.request("GET", path)
    response.read()
    connection.close()
    assert response.headers["Content-Type"] == ("image/png" if response.status == 200 else "application/json")
    return response.status


def test_links_expire(tmp_path: Path) -> None:
    catalogue = ECHO_CATALOGUE.format(step_ms=0, slots=4)
    with Deployment(tmp_path, catalogue=catalogue, redis_server=None, IMAGE_TTL_S="10") as service:
        service.start("echo-images")
        answer = service.post("/v1/images/generations", {"model": "echo-images", "prompt": "x", "n": 3})[1]
        paths = [row["url"].removeprefix(service.url) for row in answer["data"]]
        assert len(set(paths)) == 3
        assert status_of(service, paths[0]) == 200
        wait_until(lambda: status_of(service, paths[0]) == 404, timeout_s=30, what="the link expires")


def test_the_store_is_bounded_and_the_oldest_images_are_removed_first(tmp_path: Path) -> None:
    catalogue = ECHO_CATALOGUE.format(step_ms=0, slots=4)
    with Deployment(tmp_path, catalogue=catalogue, redis_server=None, IMAGE_STORE_MB="1") as service:
        service.start("echo-images")
        links = []
        for _ in range(30):
            body = {"model": "echo-images", "prompt": "x", "n": 10, "size": "2048x2048"}
            status, answer = service.post("/v1/images/generations", body)
            assert status == 200, answer
            links += [row["url"].removeprefix(service.url) for row in answer["data"]]
        client = service.redis.client
        stored = sum(
            client.strlen(name) for name in client.keys("*image:*") if client.type(name) == b"string"
        )
        assert stored <= 2**20
        assert status_of(service, links[0]) == 404
        assert status_of(service, links[-1]) == 200


def noise() -> str:
    """An image of 8 MiB, in a body of 11 MiB."""
    png = io.BytesIO()
    Image.frombytes("RGB", (1700, 1700), os.urandom(3 * 1700 * 1700)).save(png, "PNG")
    return base64.b64encode(png.getvalue()).decode()


def test_the_memory_of_large_bodies_is_returned_to_the_system(tmp_path: Path) -> None:
    catalogue = ECHO_CATALOGUE.format(step_ms=0, slots=4)
    body = json.dumps({"model": "echo-images", "prompt": "x", "image": noise()}).encode()
    with Deployment(tmp_path, catalogue=catalogue, redis_server=None) as service:
        service.start("echo-images")
        assert service.web is not None
        (web,) = psutil.Process(service.web.pid).children()
        before = web.memory_info().rss
        with ThreadPoolExecutor(12) as clients:
            for _ in range(3):
                sent = [clients.submit(service.post, "/v1/images/edits", body) for _ in range(12)]
                assert {one.result()[0] for one in sent} == {200}
        wait_until(
            lambda: web.memory_info().rss - before < 30 * 2**20,
            timeout_s=20,
            what="the memory of 36 bodies is free",
        )


def test_an_edit_that_waits_keeps_its_image_in_redis_alone(tmp_path: Path) -> None:
    image = noise()
    catalogue = ECHO_CATALOGUE.format(step_ms=0, slots=4)
    with Deployment(tmp_path, catalogue=catalogue, redis_server=None) as service:
        service.start("echo-images")
        assert service.web is not None
        (web,) = psutil.Process(service.web.pid).children()
        (worker,) = service.workers.values()

        def edit(image: str) -> int:
            body = {"model": "echo-images", "prompt": "x", "image": image}
            return service.post("/v1/images/edits", body)[0]

        def waits(count: int) -> bool:
            return bool(service.redis.client.zcard("Test:waiting:echo-images") == count)

        assert edit(image) == 200
        before = web.memory_info().rss
        worker.signal(signal.SIGSTOP)
        # twelve bodies of 8 MiB may take longer than the lease of a worker that is stopped
        (lease,) = service.redis.client.scan_iter("Test:lease:*")
        service.redis.client.persist(lease)
        with ThreadPoolExecutor(12) as clients:
            for count in range(1, 13):  # one after the other: the peak of reading bodies is not the question
                clients.submit(edit, image)
                wait_until(partial(waits, count), timeout_s=30, what="the edit waits")
            grown = (web.memory_info().rss - before) / 2**20
            worker.signal(signal.SIGCONT)
        assert grown < 60, f"{grown:.0f} MiB for 12 edits of 8 MiB"
