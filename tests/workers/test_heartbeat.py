"""The pulse of a worker: what holds while it ends."""

import threading
from typing import Any, cast

from workers.heartbeat import Heartbeat


def test_a_stop_waits_for_a_renewal_under_way_which_would_undo_the_release() -> None:
    begun, go, order = threading.Event(), threading.Event(), []

    class SlowLeases:
        def renew_worker(self, record: object) -> None:
            begun.set()
            go.wait(60)
            order.append("renewed")

    def nothing(*_: object) -> None:
        raise AssertionError("neither lapsed nor replaced nor hung")

    heartbeat = Heartbeat(
        cast(Any, SlowLeases()),
        cast(Any, None),
        describe=lambda: cast(Any, object()),
        on_lapsed=nothing,
        on_replaced=nothing,
        on_hung=nothing,
        hang_s=60,
    )

    def stop() -> None:
        heartbeat.stop()
        order.append("stopped")

    heartbeat.start()
    assert begun.wait(30)
    stopper = threading.Thread(target=stop)
    stopper.start()
    stopper.join(0.2)  # one that doesn't wait is through by now
    go.set()
    stopper.join(30)
    heartbeat.join(30)
    assert order == ["renewed", "stopped"]
