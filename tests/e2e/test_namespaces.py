"""Two deployments on one Redis that differ only in NAMESPACE."""

from pathlib import Path

from tests.deployment import ECHO_CATALOGUE, Deployment, RedisServer


def test_two_deployments_on_one_redis_do_not_notice_each_other(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    catalogue = ECHO_CATALOGUE.format(step_ms=0, slots=4)
    one = Deployment(tmp_path / "one", catalogue=catalogue, redis_server=redis_server, NAMESPACE="one")
    two = Deployment(tmp_path / "two", catalogue=catalogue, redis_server=redis_server, NAMESPACE="two")
    with one, two:
        two.launch_web()
        one.start("echo")
        two.wait_web()
        assert [row["model"] for row in one.worker_rows()] == ["echo"]
        assert two.worker_rows() == []
        assert two.chat("hi", "echo")[0] == 503, "it must not use the other deployment's worker"
        served_by_one = served_request(one)
        worker_of_two = two.workers[two.start_worker("echo")]
        two.wait_ready("echo")
        served_by_two = served_request(two)
        # A worker logs a request when it receives it, and both requests have been answered.
        assert served_by_two in worker_of_two.log.read_text()
        [worker_of_one] = one.workers.values()
        assert served_by_one in worker_of_one.log.read_text()
        assert served_by_two not in worker_of_one.log.read_text(), "received from the other's queue"
        names = {name.decode() for name in redis_server.client.keys("*")}
        strays = {name for name in names if not name.startswith(("one:", "two:", "test"))}
        assert not strays, f"keys outside both namespaces: {strays}"


def served_request(service: Deployment) -> str:
    """Let `service` answer a request; return its id."""
    status, answer = service.chat("hi", "echo", max_tokens=2)
    assert status == 200, answer
    return str(answer["id"])
