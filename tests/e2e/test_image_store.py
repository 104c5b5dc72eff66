"""Image links: they work for IMAGE_TTL_S and are 404 afterwards; the store never exceeds IMAGE_STORE_MB."""

from pathlib import Path

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
