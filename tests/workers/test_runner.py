"""workers.runner on a real Redis, with an engine that a test drives by hand."""

import logging
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock, call

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from config import Settings
from logs import Entry
from protocol import events
from protocol.celery_app import create_celery
from protocol.connections import RedisClient
from protocol.errors import Cancelled, EngineError
from protocol.event_sender import EventSender
from protocol.events import Delta, Event, Failed, Finished, ImageReady, Progress, Started, Usage
from protocol.jobs import ChatJob, Job, SamplingParams
from protocol.names import Keys
from protocol.queue import JobQueue
from protocol.resumable_streams import ResumableStreams, StreamRecord
from tests.deployment import RedisServer, wait_until
from tests.records import worker_record
from workers.engines.base import CancelReason, Emit, EngineStatus
from workers.gpu_time import GpuTime
from workers.job_log import JobLog
from workers.runner import Runner
from workers.stream_readers import StreamReaders
from workers.throughput import Throughput

MODEL, ME = "m", "cid:1"


class HandEngine:
    """Implements workers.engines.base.Engine: notes what it is asked, and generates nothing by itself."""

    def __init__(self) -> None:
        self.refuses = False
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.cancels: queue.SimpleQueue[tuple[str, CancelReason]] = queue.SimpleQueue()

    def load(self, emit: Emit) -> None:
        raise AssertionError("the runner does not load engines")

    def submit(self, job: Job) -> None:
        if self.refuses:
            raise RuntimeError("no job of mine")
        self.jobs.put(job)

    def cancel(self, request_id: str, reason: CancelReason) -> None:
        self.cancels.put((request_id, reason))

    def status(self) -> EngineStatus:
        return EngineStatus(True, 0, 0, 0)

    def close(self) -> None:
        raise AssertionError("the runner does not close engines")


class Bench:
    """A runner with everything it uses."""

    def __init__(self, server: RedisServer, keys: Keys, client: RedisClient | None = None) -> None:
        self.redis: Any = server.client
        self.keys = keys
        self.celery = create_celery(Settings(redis_url=server.url), keys)
        self.queue = JobQueue(client or self.redis, keys, self.celery, claim_ttl_s=100)
        self.engine = HandEngine()
        self.sender = EventSender(self.redis, keys, prepare=lambda event: event)
        self.throughput = Mock(Throughput)
        self.ended: list[JobLog] = []
        self.runner = Runner(
            worker_record(incarnation_id=ME, model=MODEL),
            self.queue,
            self.engine,
            self.sender,
            self.throughput,
            GpuTime(),
            on_ended=self.ended.append,
        )
        self.tasks: list[threading.Thread] = []

    def admit(
        self,
        request_id: str,
        *,
        model: str = MODEL,
        web_id: str = "web",
        deadline_s: float = 60,
        resumable: bool = False,
    ) -> None:
        messages = [{"role": "user", "content": "hi"}]
        job = ChatJob(
            id=request_id, model=model, messages=messages, sampling=SamplingParams(), resumable=resumable
        )
        JobQueue(self.redis, self.keys, self.celery, claim_ttl_s=100).admit(
            job, web_id=web_id, deadline_s=deadline_s, max_waiting=100
        )

    def start(self, request_id: str) -> threading.Thread:
        """Run the task in a thread of its own, as Celery does."""
        task = threading.Thread(target=self.runner.run, args=(request_id,), daemon=True)
        task.start()
        self.tasks.append(task)
        return task

    def start_and_submit(self, request_id: str) -> threading.Thread:
        """Run the task; returns when the engine has its job."""
        task = self.start(request_id)
        assert self.engine.jobs.get(timeout=60).id == request_id
        return task

    def emit(self, request_id: str, *gained: Event) -> None:
        self.sender.emit([(request_id, event) for event in gained])

    def replay(self, request_id: str) -> list[Event]:
        """What was written for a web process that reads the request's events late."""
        found = self.redis.lrange(self.keys.replay(request_id), 0, -1)
        return [envelope.event for envelope in events.decode_readable(found)]

    def untouched(self) -> bool:
        """The engine was asked nothing."""
        return self.engine.jobs.empty() and self.engine.cancels.empty()


@pytest.fixture
def bench(redis_server: RedisServer, keys: Keys) -> Iterator[Bench]:
    bench = Bench(redis_server, keys)
    bench.sender.start()
    yield bench
    bench.runner.fail_all(Failed("cancelled", "the test is over"))
    for task in bench.tasks:
        join(task)
    bench.sender.stop(30)


def join(task: threading.Thread) -> None:
    task.join(60)
    assert not task.is_alive(), "the task did not return"


def test_a_request_is_claimed_submitted_and_seen_to_its_end(bench: Bench) -> None:
    bench.admit("a")
    task = bench.start_and_submit("a")
    assert bench.runner.running() == ["a"]
    assert bench.redis.get(bench.keys.claim("a")) == ME.encode()

    bench.emit("a", Delta("text"), Finished())
    join(task)

    assert bench.replay("a") == [Started(ME), Delta("text"), Finished()]
    assert bench.runner.running() == []
    assert not bench.redis.exists(bench.keys.job("a"))
    assert bench.engine.cancels.empty()


def test_finished_requests_are_measured_as_work_and_failed_ones_as_none(bench: Bench) -> None:
    bench.admit("a")
    bench.admit("b")
    task, other = bench.start_and_submit("a"), bench.start_and_submit("b")
    bench.emit("a", Finished())
    join(task)
    bench.emit("b", Failed.of(EngineError()))
    join(other)
    assert bench.throughput.mock_calls == [call.started(), call.started(), call.ended(1.0), call.ended(0)]


def test_a_second_message_for_a_running_request_is_dropped(bench: Bench) -> None:
    bench.admit("a")
    task = bench.start_and_submit("a")

    join(bench.start("a"))
    assert bench.runner.running() == ["a"]
    bench.emit("a", Finished())
    join(task)

    assert bench.untouched()
    assert bench.replay("a") == [Started(ME), Finished()]


def test_a_request_that_another_worker_has_claimed_is_left_to_it(bench: Bench) -> None:
    bench.admit("a")
    assert bench.queue.claim("a", MODEL, "cid:another") is not None

    join(bench.start("a"))

    assert bench.untouched()
    assert bench.replay("a") == []
    assert bench.redis.exists(bench.keys.job("a"))


def test_the_client_of_a_job_of_another_version_gets_an_error(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.admit("a")
    bench.redis.hset(bench.keys.job("a"), "body", b'{"type":"chat","id":"a","model":7}')

    join(bench.start("a"))

    assert bench.untouched()
    assert "another version of this service" in caplog.text
    assert [type(event) for event in bench.replay("a")] == [Started, Failed]
    assert not bench.redis.exists(bench.keys.job("a"))


def test_the_client_of_a_job_for_another_model_gets_an_error(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator may have sent it to the wrong queue.

    The engine would fail on it, or answer as the wrong model.
    """
    bench.admit("a", model="another")

    join(bench.start("a"))

    assert bench.untouched()
    assert "is for model another" in caplog.text
    assert [type(event) for event in bench.replay("a")] == [Started, Failed]
    assert not bench.redis.exists(bench.keys.job("a"))


def test_a_job_without_a_client_is_deleted(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.admit("a")
    bench.redis.hdel(bench.keys.job("a"), "web")

    join(bench.start("a"))

    assert bench.untouched()
    assert "request a could not be read" in caplog.text
    assert not bench.redis.exists(bench.keys.job("a"))


def test_the_client_of_a_job_that_the_engine_does_not_take_gets_an_error(bench: Bench) -> None:
    bench.engine.refuses = True
    bench.admit("a")
    join(bench.start("a"))
    assert bench.replay("a")[-1] == Failed.of(EngineError())
    assert bench.runner.running() == [] and not bench.redis.exists(bench.keys.job("a"))


class LostAnswers:
    """A client whose scripts lose their first answers after they were executed."""

    def __init__(self, client: RedisClient, failures: int) -> None:
        self._client = client
        self.failures = failures

    def pipeline(self, transaction: bool) -> Any:
        return self._client.pipeline(transaction)

    def register_script(self, source: str) -> Callable[..., Any]:
        script = self._client.register_script(source)

        def run(**arguments: Any) -> Any:
            answer = script(**arguments)
            if self.failures:
                self.failures -= 1
                raise redis.TimeoutError("the answer was lost")
            return answer

        return run


def test_a_claim_whose_answer_was_lost_is_asked_for_again(redis_server: RedisServer, keys: Keys) -> None:
    client = LostAnswers(redis_server.client, failures=1)
    bench = Bench(redis_server, keys, cast(Any, client))
    bench.sender.start()
    bench.admit("a")

    task = bench.start_and_submit("a")
    bench.emit("a", Finished())
    join(task)

    assert client.failures == 0
    bench.sender.stop(30)


@pytest.fixture
def stalling(
    tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[RedisServer, Bench]]:
    """A Redis of its own that a test stalls, and a runner whose commands to it time out soon."""
    monkeypatch.setattr("workers.runner.RETRY_PAUSE_S", 0.1)
    monkeypatch.setattr("protocol.event_sender.RESEND_S", 0.1)
    server = RedisServer(tmp_path)
    server.start()
    server.client.close()
    server.client = redis.Redis(port=server.port, socket_timeout=0.2, retry=Retry(NoBackoff(), 0))
    bench = Bench(server, keys)
    bench.sender.start()
    yield server, bench
    server.kill(signal.SIGCONT)
    bench.runner.fail_all(Failed("cancelled", "the test is over"))
    bench.sender.stop(30)
    server.stop()


def test_a_claim_waits_for_a_redis_that_stalls(
    stalling: tuple[RedisServer, Bench], caplog: pytest.LogCaptureFixture
) -> None:
    server, bench = stalling
    bench.admit("a")
    server.kill(signal.SIGSTOP)
    task = bench.start("a")
    wait_until(lambda: "request a waits for Redis" in caplog.text, timeout_s=60, what="a failed attempt")
    assert bench.untouched()

    server.kill(signal.SIGCONT)
    assert bench.engine.jobs.get(timeout=60).id == "a"
    bench.emit("a", Finished())
    join(task)
    assert bench.replay("a") == [Started(ME), Finished()]


def test_a_job_is_deleted_after_a_stall_in_which_its_events_were_lost(
    stalling: tuple[RedisServer, Bench], caplog: pytest.LogCaptureFixture
) -> None:
    """Without this its client would wait until the deadline: the claim's worker lives and the job is
    there."""
    server, bench = stalling
    bench.admit("a")
    task = bench.start_and_submit("a")
    wait_until(lambda: bench.replay("a"), timeout_s=60, what="the first event is written")
    server.kill(signal.SIGSTOP)
    bench.emit("a", Finished())
    wait_until(lambda: "end of request a waits for Redis" in caplog.text, timeout_s=60, what="a failed end")
    join(bench.start("a"))
    assert task.is_alive(), "until the job is deleted, a second message must not run it again"

    server.kill(signal.SIGCONT)
    join(task)
    assert not bench.redis.exists(bench.keys.job("a"))
    assert bench.engine.cancels.get(timeout=60) == ("a", "cancelled")


def test_a_claim_that_is_forbidden_is_not_repeated(
    stalling: tuple[RedisServer, Bench], caplog: pytest.LogCaptureFixture
) -> None:
    server, bench = stalling
    bench.admit("a")
    server.client.execute_command("ACL", "SETUSER", "default", "-eval", "-evalsha")
    join(bench.start("a"))
    assert "request a could not be read" in caplog.text
    server.client.execute_command("ACL", "SETUSER", "default", "+eval", "+evalsha")


def test_at_its_deadline_a_request_is_cancelled_and_its_end_awaited(bench: Bench) -> None:
    bench.admit("a", deadline_s=0.5)
    task = bench.start_and_submit("a")

    assert bench.engine.cancels.get(timeout=60) == ("a", "deadline")
    assert task.is_alive()
    bench.emit("a", Delta("", finish_reason="length"), Finished())
    join(task)

    assert bench.replay("a")[-1] == Finished()


def test_a_request_whose_events_cannot_be_delivered_is_cancelled_and_ends(bench: Bench) -> None:
    bench.admit("a")
    bench.admit("waiting")
    task = bench.start_and_submit("a")
    bench.emit("a", Delta("text"))
    wait_until(lambda: bench.replay("a"), timeout_s=60, what="the first event is written")

    bench.redis.delete(bench.keys.replay("a"))
    bench.emit("a", Delta("more"))
    join(task)

    assert bench.engine.cancels.get(timeout=60) == ("a", "cancelled")
    assert bench.runner.running() == []


def test_requests_of_a_lost_web_process_are_cancelled_and_later_ones_run(bench: Bench) -> None:
    bench.admit("running", web_id="lost")
    bench.admit("other", web_id="alive")
    task, other = bench.start_and_submit("running"), bench.start_and_submit("other")
    assert bench.runner.web_ids() == {"lost", "alive"}

    bench.runner.set_lost_webs({"lost"})
    assert bench.engine.cancels.get(timeout=60) == ("running", "cancelled")
    bench.emit("running", Failed("cancelled", "nobody waits"))
    join(task)
    assert bench.runner.web_ids() == {"alive"}

    # the process was only paused: what it sends now is served
    bench.admit("later", web_id="lost")
    bench.start_and_submit("later")
    assert other.is_alive()


def test_fail_all_ends_every_request_without_the_engine(bench: Bench) -> None:
    for request_id in "ab":
        bench.admit(request_id)
    tasks = [bench.start_and_submit(request_id) for request_id in "ab"]
    failure = Failed("worker_lost", "the worker failed")

    bench.runner.fail_all(failure)
    for task in tasks:
        join(task)

    assert bench.replay("a")[-1] == bench.replay("b")[-1] == failure


def test_a_revoke_ends_a_running_request_and_one_that_waits(bench: Bench) -> None:
    for name in ("running", "waiting"):
        bench.admit(name)
    task = bench.start_and_submit("running")
    bench.runner.revoke("running")
    assert bench.engine.cancels.get(timeout=60) == ("running", "cancelled")
    bench.emit("running", Failed.of(Cancelled()))
    join(task)
    bench.runner.revoke("waiting")
    assert bench.replay("waiting")[-1] == Failed.of(Cancelled())
    assert not bench.redis.exists(bench.keys.job("waiting"))


def test_a_revoke_leaves_alone_what_is_not_its_own(bench: Bench) -> None:
    bench.admit("claimed")
    assert bench.queue.claim("claimed", MODEL, "another:1") is not None
    bench.admit("other", model="another")
    for name in ("claimed", "other", "unknown"):
        bench.runner.revoke(name)
        assert bench.replay(name) == []
    assert bench.untouched()
    assert not bench.redis.exists(bench.keys.claim("other"), bench.keys.claim("unknown"))


def job_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of what was logged of jobs."""
    found: list[Any] = [record.msg for record in caplog.records]
    return [entry.fields for entry in found if isinstance(entry, Entry) and entry.name == "job"]


def test_a_chat_is_logged_when_it_has_ended(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench.admit("a")
    task = bench.start_and_submit("a")
    bench.emit(
        "a", Delta("text"), Delta("", finish_reason="stop"), Delta("", index=1, finish_reason="length")
    )
    bench.emit("a", Finished(Usage(7, 3, 2)))
    join(task)
    (found,) = job_lines(caplog)
    assert 0 <= found.pop("queued_s") <= found.pop("first_token_s") <= found.pop("total_s")
    assert found.pop("gpu_s") >= 0
    assert found == {
        "request_id": "a",
        "model": MODEL,
        "task": "chat",
        "outcome": "completed",
        "finish_reason": "stop,length",
        "prompt_tokens": 7,
        "cached_tokens": 2,
        "completion_tokens": 3,
    }


def test_images_are_logged_with_steps_and_size(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench.admit("a")
    task = bench.start_and_submit("a")
    bench.emit("a", Progress(1, 8), Progress(8, 8))
    bench.emit("a", *[ImageReady(index, 0, 64, 96) for index in range(2)], Finished())
    join(task)
    (found,) = job_lines(caplog)
    assert {name: found[name] for name in ("images", "steps", "width", "height")} == {
        "images": 2,
        "steps": 8,
        "width": 64,
        "height": 96,
    }
    assert "first_token_s" not in found and "prompt_tokens" not in found


def test_the_outcome_says_how_a_job_failed(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for name in ("fails", "another's", "lost", "cancelled"):
        bench.admit(name, model="another" if name == "another's" else MODEL)
    task = bench.start_and_submit("fails")
    bench.emit("fails", Failed.of(EngineError()))
    join(task)
    join(bench.start("another's"))
    for name in ("lost", "cancelled"):
        task = bench.start_and_submit(name)
        wait_until(lambda: bench.replay(name), timeout_s=60, what="the first event is written")  # noqa: B023
        if name == "lost":
            bench.redis.delete(bench.keys.replay(name))
        else:
            bench.queue.cancel(name, MODEL)
        bench.emit(name, Delta("text"))
        join(task)
    outcomes = {found["request_id"]: found["outcome"] for found in job_lines(caplog)}
    assert outcomes == {
        "fails": "engine_error",
        "another's": "engine_error",
        "lost": "undelivered",
        "cancelled": "cancelled",
    }
    assert [(log.outcome, log.gpu_s is None) for log in bench.ended] == [
        ("engine_error", False),
        ("engine_error", True),  # the engine never had it
        ("undelivered", False),
        ("cancelled", False),
    ]


def test_the_time_in_the_queue_is_that_before_the_claim(bench: Bench) -> None:
    bench.admit("a", deadline_s=60)
    bench.redis.hincrbyfloat(bench.keys.job("a"), "admitted", -5)
    claimed = bench.queue.claim("a", MODEL, ME)
    assert claimed is not None
    assert claimed.queued_s + claimed.remaining_s == pytest.approx(65, abs=0.01)


class Streams:
    """A stream that can be resumed, and what follows its readers."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.records = ResumableStreams(bench.redis, bench.keys, ttl_s=100)
        self.follower = StreamReaders(self.records, bench.runner, bench.sender)
        bench.admit("a", web_id="web-1", resumable=True)
        self.task = bench.start_and_submit("a")
        self.inboxes = bench.redis.pubsub(ignore_subscribe_messages=True)

    def begin(self) -> None:
        record = StreamRecord(
            model=MODEL, n=1, include_usage=False, created=1, deadline_s=60, queued_s=0, first_token_s=0
        )
        self.records.begin("a", record, reader="web-1:x", owner="", grace_s=50, elapsed_s=0)
        self.follower.follow()


@pytest.fixture
def streams(bench: Bench) -> Streams:
    return Streams(bench)


def test_a_stream_that_has_not_begun_ends_with_its_web_process(bench: Bench, streams: Streams) -> None:
    streams.follower.follow()
    bench.runner.set_lost_webs({"web-1"})
    assert bench.engine.cancels.get(timeout=60) == ("a", "cancelled")


def test_a_stream_is_sent_to_the_web_process_of_its_reader(bench: Bench, streams: Streams) -> None:
    streams.begin()
    assert bench.runner.web_ids() == {"web-1"}
    streams.records.leave("a", "web-1:x", finished=False)
    streams.follower.follow()
    assert bench.runner.web_ids() == set()
    streams.records.take_over("a", reader="web-2:y", owner="")
    streams.follower.follow()
    assert bench.runner.web_ids() == {"web-2"}
    streams.inboxes.subscribe(bench.keys.channel("web-2"))
    bench.emit("a", Delta("more"))

    def message() -> Any:
        return streams.inboxes.get_message(timeout=1)

    found = wait_until(message, timeout_s=60, what="the event is published for web-2")
    assert found is not None
    assert [envelope.event for envelope in events.decode_batch(found["data"])] == [Delta("more")]
    assert bench.engine.cancels.empty()


def test_a_stream_whose_web_process_is_lost_has_a_grace_period(bench: Bench, streams: Streams) -> None:
    streams.begin()
    streams.follower.leave_lost({"web-1"})
    bench.runner.set_lost_webs({"web-1"})
    streams.follower.follow()
    assert streams.records.readers(["a"]) == [""]
    assert 0 < bench.redis.ttl(bench.keys.stream("a")) <= 50
    # only the first loss begins it
    streams.follower.leave_lost({"web-1", ""})
    assert bench.engine.cancels.empty()
    bench.redis.delete(bench.keys.stream("a"))
    streams.follower.follow()
    assert bench.engine.cancels.get(timeout=60) == ("a", "cancelled")
