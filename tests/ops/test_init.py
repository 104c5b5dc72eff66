"""What process 1 of a container owes the others. Here a subreaper gets the orphans instead of process 1."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deployment import wait_until
from tests.ops.stand_ins import alive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="orphans go to a subreaper on Linux only")

_CONTAINER = """
import ctypes, os, subprocess, sys, time
from supervise.init import run_as_init
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER, linux/prctl.h
run_as_init()
{body}
"""


def start(body: str) -> subprocess.Popen[str]:
    script = _CONTAINER.format(body=body)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def test_orphans_are_reaped() -> None:
    body = """
orphan = subprocess.check_output(["sh", "-c", "sleep 0.1 >/dev/null & echo $!"], text=True)
print(orphan, flush=True)
time.sleep(60)
"""
    with start(body) as container:
        assert container.stdout is not None
        orphan = int(container.stdout.readline())
        wait_until(lambda: not Path(f"/proc/{orphan}").exists(), timeout_s=20, what="the orphan is reaped")
        container.send_signal(signal.SIGTERM)
        assert container.wait(20) == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on_and_the_status_is_returned(number: signal.Signals) -> None:
    body = f"""
import signal
signal.signal({int(number)}, lambda *_: os._exit(7))
print(os.getpid(), flush=True)
time.sleep(60)
"""
    with start(body) as container:
        assert container.stdout is not None
        child = int(container.stdout.readline())
        assert child != container.pid
        container.send_signal(number)
        assert container.wait(20) == 7
        assert not alive(child)
