"""Two deployments on one Redis that differ in NAMESPACE alone."""

from pathlib import Path

from tests.deployment import ECHO_CATALOGUE, Deployment, RedisServer


def test_two_deployments_on_one_redis_do_not_notice_each_other(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    catalogue = ECHO_CATALOGUE.format(step_ms=0, slots=4)
    one = Deployment(tmp_path / "one", catalogue=catalogue, redis_server=redis_server, NAMESPACE="one")
    two = Deployment(tmp_path / "two", catalogue=catalogue, redis_server=redis_server, NAMESPACE="two")
    with one, two:
        one.start("echo")
        two.start()
        assert [row["model"] for row in one.worker_rows()] == ["echo"]
        assert two.worker_rows() == []
        assert two.chat("hi", "echo")[0] == 503, "the other deployment's worker is none of ours"
        assert one.chat("hi", "echo", max_tokens=2)[0] == 200
        two.start_worker("echo")
        two.wait_ready("echo")
        served_before = {row["cid"]: row["steps"] for row in one.worker_rows()}
        assert two.chat("hi", "echo", max_tokens=5)[0] == 200
        assert {row["cid"]: row["steps"] for row in one.worker_rows()} == served_before
        names = {name.decode() for name in redis_server.client.keys("*")}
        strays = {name for name in names if not name.startswith(("one:", "two:", "test"))}
        assert not strays, f"keys outside both namespaces: {strays}"
