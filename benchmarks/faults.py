"""Measures how faulty clients slow down others: slow senders, overload, a stalled reader.

Run: python -m benchmarks.faults. tests/faults assert the outcomes; these are the times, which depend on the
machine. The echo engine stands in for a GPU; web process, Redis, worker and clients share the machine.
"""

import argparse
import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from benchmarks.stream_client import StreamResult, chat_request, percentile, run_streams
from tests.deployment import ECHO_CATALOGUE, ROOT, Deployment, wait_until
from tests.faults.test_clients import SlowConnections, slow_openings, waiting
from tests.faults.test_load import DEADLINE_S, MAX_WAITING, SLOTS, STEP_MS, QueueWatch, flood

RESULTS = ROOT / "benchmarks" / "results"

Figures = dict[str, float]


def deployment(folder: str, step_ms: float, slots: int, **environment: str) -> Deployment:
    catalogue = ECHO_CATALOGUE.format(step_ms=step_ms, slots=slots)
    return Deployment(Path(folder), catalogue=catalogue, redis_server=None, **environment)


def timed(call: Callable[[], object]) -> float:
    """Return the milliseconds that `call` takes."""
    began = time.monotonic()
    call()
    return (time.monotonic() - began) * 1000


def slowloris(rounds: int) -> Figures:
    """Measure GET /v1/models alone, then beside 200 connections that send their requests byte by byte."""
    with tempfile.TemporaryDirectory() as folder, deployment(folder, 20, 8) as service:
        service.start("echo")
        alone = [timed(lambda: service.get("/v1/models")) for _ in range(rounds)]
        over = threading.Event()
        slow = SlowConnections(service.port, slow_openings(100, 100))

        def send() -> None:
            while not over.is_set():
                slow.turn()

        thread = threading.Thread(target=send)
        thread.start()
        beside: list[float] = []
        while time.monotonic() - slow.began < 9 or len(beside) < rounds:
            beside.append(timed(lambda: service.get("/v1/models")))
        over.set()
        thread.join()
        slow.close()
    return {
        "models_alone_ms_p99": percentile(alone, 0.99),
        "models_beside_200_slowloris_ms_p99": percentile(beside, 0.99),
    }


def overload() -> Figures:
    """Send ten times the capacity for twenty seconds."""
    limits = {"MAX_WAITING": str(MAX_WAITING), "CHAT_DEADLINE_S": str(DEADLINE_S)}
    with tempfile.TemporaryDirectory() as folder, deployment(folder, STEP_MS, SLOTS, **limits) as service:
        service.start("echo")
        queue = QueueWatch(service)
        answers = flood(service)
        longest = queue.end()
    refused = [answer.seconds * 1000 for answer in answers if answer.status == 503]
    served = [answer.seconds for answer in answers if answer.status == 200]
    return {
        "flood_served": len(served),
        "flood_refused": len(refused),
        "flood_refusal_ms_p99": percentile(refused, 0.99),
        "flood_served_s_max": max(served),
        "flood_longest_queue": longest,
    }


def _body(tokens: int) -> dict[str, object]:
    return {"model": "echo", "messages": [{"role": "user", "content": "count"}], "max_tokens": tokens}


def _gaps_ms(results: list[StreamResult]) -> list[float]:
    return [gap * 1000 for result in results for gap in result.gaps_s]


def stalled_reader(streams: int) -> Figures:
    """Measure the gaps between tokens of streams, without and with another stream that is not read."""
    requests = [chat_request("127.0.0.1", _body(1000))] * streams
    with tempfile.TemporaryDirectory() as folder, deployment(folder, 20, streams + 1) as service:
        service.start("echo")
        run_streams(service.port, [chat_request("127.0.0.1", _body(50))] * streams)
        without = _gaps_ms(run_streams(service.port, requests))
        with closing(socket.socket()) as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.connect(("127.0.0.1", service.port))
            stalled.sendall(chat_request("127.0.0.1", _body(100_000)))
            beside = _gaps_ms(run_streams(service.port, requests))
    before, after = percentile(without, 0.99), percentile(beside, 0.99)
    return {
        "gap_ms_p99": before,
        "gap_beside_stalled_reader_ms_p99": after,
        "gap_worse_percent": (after / before - 1) * 100,
    }


def first_token_under_load(rounds: int) -> Figures:
    """Measure the first token of one request beside 60 open streams, with a free slot for it."""
    with tempfile.TemporaryDirectory() as folder, deployment(folder, 20, 64) as service:
        service.start("echo")

        def first_token() -> float:
            (result,) = run_streams(service.port, [chat_request("127.0.0.1", _body(1))])
            return (result.first_token_at - result.sent_at) * 1000

        alone = [first_token() for _ in range(rounds)]
        loaded: list[float] = []
        results: list[StreamResult] = []
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(
                run_streams, service.port, [chat_request("127.0.0.1", _body(1500))] * 60, 300, results
            )
            wait_until(
                lambda: len(results) == 60 and all(result.tokens for result in results),
                timeout_s=60,
                what="60 streams have begun",
            )
            while len(loaded) < rounds and not load.done():
                loaded.append(first_token())
            load.result()
    return {
        "first_token_alone_ms_p50": percentile(alone, 0.5),
        "first_token_beside_60_ms_p50": percentile(loaded, 0.5),
        "first_token_beside_60_ms_p99": percentile(loaded, 0.99),
    }


def cancel(rounds: int) -> Figures:
    """Measure the time from a client's disconnect to the end of its task in the worker."""
    took = []
    with tempfile.TemporaryDirectory() as folder, deployment(folder, 20, 8) as service:
        service.start("echo")
        for _ in range(rounds):
            stream = service.stream("count", "echo", max_tokens=50_000)
            next(stream.events())
            assert service.running_tasks() == 1 and not waiting(service)
            stream.close()
            took.append(
                timed(
                    lambda: wait_until(
                        lambda: not service.running_tasks(), timeout_s=20, what="the task ends"
                    )
                )
            )
    return {"cancel_ms_p50": percentile(took, 0.5), "cancel_ms_max": max(took)}


def main() -> None:
    parts: dict[str, Callable[[], Figures]] = {
        "slowloris": lambda: slowloris(options.rounds),
        "flood": overload,
        "stalled": lambda: stalled_reader(options.streams),
        "first": lambda: first_token_under_load(options.rounds // 2),
        "cancel": lambda: cancel(options.rounds // 10),
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--only", choices=list(parts))
    options = parser.parse_args()
    figures: Figures = {}
    for name, part in parts.items():
        if options.only in (None, name):
            figures |= part()
    for name, value in figures.items():
        print(f"{name:36} {value:10.2f}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept = RESULTS / "faults.json"
    before = json.loads(kept.read_text()) if options.only and kept.exists() else {}
    kept.write_text(json.dumps(before | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
