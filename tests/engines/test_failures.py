"""What the client and the log get when an engine raises."""

import pytest
import torch

from protocol.errors import InvalidImage
from protocol.events import Failed
from workers.engines.failures import failure_of


def raised(error: Exception) -> Exception:
    """The error as an engine catches it, with a traceback."""
    try:
        raise error
    except Exception as caught:
        return caught


def test_an_error_made_for_the_client_is_passed_on_and_not_logged(caplog):
    assert failure_of(InvalidImage("mask is damaged", param="mask")) == Failed(
        "invalid_image", "mask is damaged", "mask"
    )
    assert not caplog.records


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_recognised_on_a_gpu_and_on_a_cpu(error, caplog):
    assert failure_of(raised(error)).code == "out_of_memory"
    assert "test_failures.py" in caplog.text


@pytest.mark.parametrize(
    ("error", "logged"),
    [(ValueError("PROMPT"), "ValueError"), (RuntimeError("[2, 3]"), "RuntimeError: [2, 3]")],
)
def test_the_log_gets_type_and_traceback_and_only_the_text_of_torch(error, logged, caplog):
    assert failure_of(raised(error)) == Failed("engine_error", "the model failed on this request")
    assert logged in caplog.text and "test_failures.py" in caplog.text
    assert "PROMPT" not in caplog.text
