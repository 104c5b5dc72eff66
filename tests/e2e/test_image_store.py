"""Picture links: they work for IMAGE_TTL_S and then are 404; the store never outgrows IMAGE_STORE_MB."""

from pathlib import Path

from tests.deployment import ECHO_CATALOGUE, Deployment, wait_until


def picture_status(service: Deployment, path: str) -> int:
    response, connection = service.request("GET", path)
    response.read()
    connection.close()
    assert response.headers["Content-Type"] == ("image/png" if response.status == 200 else "application/json")
    return response.status


def test_links_lapse(tmp_path: Path) -> None:
    catalogue = ECHO_CATALOGUE.format(step_ms=0, slots=4)
    with Deployment(tmp_path, catalogue=catalogue, redis_server=None, IMAGE_TTL_S="10") as service:
        service.start("echo-pictures")
        answer = service.post("/v1/images/generations", {"model": "echo-pictures", "prompt": "x", "n": 3})[1]
        paths = [row["url"].removeprefix(service.url) for row in answer["data"]]
        assert len(set(paths)) == 3
        assert picture_status(service, paths[0]) == 200
        wait_until(lambda: picture_status(service, paths[0]) == 404, timeout_s=30, what="the link lapses")


def test_the_store_is_bounded_and_the_oldest_go_first(tmp_path: Path) -> None:
    catalogue = ECHO_CATALOGUE.format(step_ms=0, slots=4)
    with Deployment(tmp_path, catalogue=catalogue, redis_server=None, IMAGE_STORE_MB="1") as service:
        service.start("echo-pictures")
        links = []
        for _ in range(30):
            body = {"model": "echo-pictures", "prompt": "x", "n": 10, "size": "2048x2048"}
            status, answer = service.post("/v1/images/generations", body)
            assert status == 200, answer
            links += [row["url"].removeprefix(service.url) for row in answer["data"]]
        client = service.redis.client
        held = sum(client.strlen(name) for name in client.keys("*image:*") if client.type(name) == b"string")
        assert held <= 2**20
        assert picture_status(service, links[0]) == 404
        assert picture_status(service, links[-1]) == 200
