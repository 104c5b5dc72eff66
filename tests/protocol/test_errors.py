"""Errors as values: each class crosses from worker to web unchanged, and Redis' errors have one mapping."""

import pytest
import redis
from kombu.exceptions import OperationalError

from protocol import errors
from protocol.connections import queue_errors
from protocol.errors import QueueUnavailable, ServiceError, from_code
from protocol.events import Envelope, Failed, decode_readable, encode

CLASSES = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ServiceError)
]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_worker_error_reaches_the_web_process_as_the_same_class(kind: type[ServiceError]) -> None:
    failed = Failed.of(kind("what was wrong", param="n"))
    [arrived] = [each.event for each in decode_readable([encode(Envelope("r", 0, failed))])]
    assert isinstance(arrived, Failed)
    error = from_code(arrived.code, arrived.message, arrived.param)
    if kind not in (errors.ServiceError, errors.InternalError):  # they share one code
        assert type(error) is kind
    assert (error.status, error.message, error.param) == (kind.status, "what was wrong", "n")


def test_a_code_of_a_newer_worker_is_an_internal_error() -> None:
    error = from_code("a_code_of_tomorrow", "why")
    assert (error.status, error.code, error.message) == (500, "internal_error", "why")


def test_a_class_without_a_default_message_needs_one() -> None:
    assert QueueUnavailable().message == QueueUnavailable.default_message
    assert QueueUnavailable().retry_after_s == 5
    assert QueueUnavailable("other", retry_after_s=1).retry_after_s == 1
    with pytest.raises(TypeError, match="NoWorker has no default message"):
        raise errors.NoWorker


@pytest.mark.parametrize("error", [redis.TimeoutError(), OperationalError(), ConnectionRefusedError()])
def test_errors_of_redis_and_of_celery_are_queue_unavailable(error: Exception) -> None:
    with pytest.raises(QueueUnavailable) as refused, queue_errors():
        raise error
    assert refused.value.__cause__ is error


def test_other_errors_pass_the_mapping_unchanged() -> None:
    with pytest.raises(KeyError), queue_errors():
        raise KeyError("a bug")
