"""Measures the service around an engine: first token, relay, open streams, import. Run: python -m
benchmarks.service

The echo engine (workers/engines/echo.py) costs almost nothing; all else is the real service, with web
process, Redis, worker and client on one machine. The results are figures of one run; only their ratios carry
over to other machines.
"""

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.stream_client import StreamResult, chat_request, percentile, run_streams
from tests.deployment import ECHO_CATALOGUE, ROOT, Deployment, wait_until

RESULTS = ROOT / "benchmarks" / "results"


def body(tokens: int) -> dict[str, object]:
    return {"model": "echo", "messages": [{"role": "user", "content": "count"}], "max_tokens": tokens}


def deployment(folder: str, step_ms: float, slots: int) -> Deployment:
    catalogue = ECHO_CATALOGUE.format(step_ms=step_ms, slots=slots)
    return Deployment(Path(folder), catalogue=catalogue, redis_server=None, MAX_WAITING="10000")


def first_token(rounds: int) -> dict[str, float]:
    """Measure the time to the first token, in turns with that of a plain Flask response (/healthz)."""
    with tempfile.TemporaryDirectory() as folder, deployment(folder, 0, 8) as service:
        service.start("echo")
        tokens, plain = [], []
        for _ in range(rounds):
            (result,) = run_streams(service.port, [chat_request("127.0.0.1", body(1))])
            tokens.append((result.first_token_at - result.sent_at) * 1000)
            began = time.monotonic()
            service.get("/healthz")
            plain.append((time.monotonic() - began) * 1000)
    ours, flask = percentile(tokens, 0.5), percentile(plain, 0.5)
    return {"first_token_ms_p50": ours, "plain_flask_ms_p50": flask, "over_plain_ms": ours - flask}


def request_cpu(requests: int) -> dict[str, float]:
    """Measure the web process's CPU time for a plain chat request, and for a Flask route that does
    nothing."""
    with tempfile.TemporaryDirectory() as folder, deployment(folder, 0, 8) as service:
        service.start("echo")
        assert service.web is not None
        (pid,) = _children(service.web.pid)
        chat = ("POST", "/v1/chat/completions", json.dumps(body(1)))
        flask = ("GET", "/healthz", None)
        _send(service.port, requests // 4, *chat)
        found: dict[str, list[float]] = {"chat": [], "flask": []}
        for _ in range(3):
            for name, request in (("chat", chat), ("flask", flask)):
                before = _cpu_s(pid)
                _send(service.port, requests, *request)
                found[name].append((_cpu_s(pid) - before) / requests * 1000)
    return {"request_cpu_ms": min(found["chat"]), "plain_flask_cpu_ms": min(found["flask"])}


def _send(port: int, requests: int, method: str, path: str, content: str | None) -> None:
    """Send `requests` requests over four kept connections."""

    def some() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for _ in range(requests // 4):
            connection.request(method, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            assert response.status == 200, response.status

    threads = [threading.Thread(target=some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def relay(streams: int, tokens: int) -> dict[str, float]:
    """Measure tokens per second through the worker's writes, pub/sub and SSE, including the client."""
    with tempfile.TemporaryDirectory() as folder, deployment(folder, 0, streams) as service:
        service.start("echo")
        run_streams(service.port, [chat_request("127.0.0.1", body(50))] * streams)
        results = run_streams(service.port, [chat_request("127.0.0.1", body(tokens))] * streams)
        assert all(result.done and result.tokens == tokens for result in results), "a stream was not complete"
        first = min(result.first_token_at for result in results)
        return {"relay_tokens_per_s": streams * tokens / (max(r.ended_at for r in results) - first)}


def idle_streams(count: int) -> dict[str, float]:
    """Measure memory of the web process for each open, idle stream, and its response times meanwhile."""
    with tempfile.TemporaryDirectory() as folder, deployment(folder, 20_000, 1000) as service:
        service.start(*["echo"] * -(-count // 1000))
        assert service.web is not None
        (pid,) = _children(service.web.pid)
        service.get("/v1/models")
        before = _resident_kb(pid)
        results: list[StreamResult] = []
        requests = [chat_request("127.0.0.1", body(10))] * count
        threading.Thread(target=run_streams, args=(service.port, requests, 200, results), daemon=True).start()
        wait_until(
            lambda: len(results) == count and all(result.tokens for result in results),
            timeout_s=120,
            what="all streams have begun",
        )
        after = _resident_kb(pid)
        times_ms = []
        for _ in range(100):
            began = time.monotonic()
            service.get("/v1/models")
            times_ms.append((time.monotonic() - began) * 1000)
        return {
            "idle_streams": count,
            "idle_kb_each": (after - before) / count,
            "idle_models_ms_p99": percentile(times_ms, 0.99),
        }


def import_cost() -> dict[str, float]:
    """Measure seconds and MB of `import wsgi` in a new process; the best of five."""
    code = (
        "import resource,time; t=time.perf_counter(); import wsgi;"
        "print(time.perf_counter()-t, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)"
    )
    found = []
    for _ in range(5):
        process = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        seconds, megabytes = process.stdout.split()
        found.append((float(seconds), float(megabytes)))
    return {"import_s": min(found)[0], "import_mb": min(found)[1]}


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _cpu_s(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--idle", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--only", choices=["first", "cpu", "relay", "idle", "import"])
    options = parser.parse_args()
    figures: dict[str, float] = {}
    if options.only in (None, "import"):
        figures |= import_cost()
    if options.only in (None, "first"):
        figures |= first_token(options.rounds)
    if options.only in (None, "cpu"):
        figures |= request_cpu(800)
    if options.only in (None, "relay"):
        figures |= relay(options.streams, options.tokens)
    if options.only in (None, "idle"):
        figures |= idle_streams(options.idle)
    for name, value in figures.items():
        print(f"{name:24} {value:10.2f}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "service.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
