"""Keeps this worker's one entry at the node true: registered ⇔ loaded ∧ web answering ∧ not draining ∧ engine healthy.

One daemon thread compares what should be with what the node is believed to have, and makes one call at a time to bring
both together, for ever, without anybody waiting for it. Only the worker itself registers; entries of workers that died
without a word are removed by node/reconciler.py.
"""

import logging
import math
import random
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from redis.exceptions import RedisError

from catalogue import ModelEntry
from config import Settings
from node.client import (
    NodeClient,
    NodeError,
    Registration,
    Siblings,
    registration_for,
    registrations_of,
)
from node.lock import NodeLock
from node.web_watch import WebWatch, http_probe
from protocol.connections import RedisClient
from protocol.leases import Leases
from protocol.names import Keys

log = logging.getLogger(__name__)

Step = Literal["register", "unregister", "look"]


@dataclass(frozen=True)
class Timing:
    """Periods in seconds. `look_every_s`: of reading the node's list; `backoff_*`: of trying again after a failure."""

    first_probe_every_s: float = 1.0
    probe_every_s: float = 5.0
    look_every_s: float = 60.0
    backoff_first_s: float = 0.5
    backoff_most_s: float = 30.0
    drain_s: float = 2.0


class Registrar:
    """The owner of one registration. `node` or `registration` None (NODE_URL empty; a task the node does not know): does
    nothing and never fails.

    `probe` says whether the web process answers and never raises; `turn` gives the node to one caller at a time;
    `on_change` is called, from any thread and outside of locks, when `registered` or `last_error` has changed.
    """

    def __init__(
        self,
        registration: Registration | None,
        node: NodeClient | None,
        probe: Callable[[], bool],
        turn: Callable[[], AbstractContextManager[bool]],
        on_change: Callable[[], None],
        *,
        siblings: Siblings | None = None,
        timing: Timing | None = None,
    ) -> None:
        self._registration = registration
        self._node = node if registration is not None else None
        self._probe = probe
        self._turn = turn
        self._on_change = on_change
        self._siblings = siblings
        self._timing = timing or Timing()
        self._web = WebWatch()
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._doing: Step | Literal["probe"] | None = None
        self._serving = self._draining = self._ended = False
        self._wanted_before = False
        # None: nobody can say. So at the start, when an earlier incarnation may have left the entry behind.
        self._at_node: bool | None = None
        self._list_unreadable = False
        self._drain_failed = False
        self._failures = 0
        self._try_at = self._look_at = self._probe_at = 0.0
        self._last_error = ""
        self._shown = (False, "")

    # ----- what others ask and say

    @property
    def registered(self) -> bool:
        """The node has said yes and was not told otherwise since. Goes into the lease's record."""
        return self._at_node is True

    @property
    def maybe_registered(self) -> bool:
        """The node has the entry or may have it (a call without an answer): somebody must still take it off."""
        return self._node is not None and self._at_node is not False

    @property
    def last_error(self) -> str:
        """Why the node isn't told what it should be told, in one line; "" when all is well."""
        return self._last_error

    def start(self) -> None:
        """Begin. The entry of an earlier incarnation is taken off until this one serves."""
        if self._node is not None and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="registrar", daemon=True)
            self._thread.start()

    def set_serving(self, serving: bool) -> None:
        """Whether the model is loaded and its engine healthy."""
        with self._wake:
            self._serving = serving
            self._wake.notify_all()

    def lease_was_lost(self) -> None:
        """This worker's lease had lapsed and stands again: the reconciler may have taken it off meanwhile."""
        with self._wake:
            self._look_at = 0.0
            self._wake.notify_all()

    def drain(self) -> bool:
        """Never register again, and take the entry off; returns after `drain_s` whatever the node does.

        False: the node could not be told so far. It is told for as long as the process lives, then by the reconciler.
        """
        give_up_at = time.monotonic() + self._timing.drain_s
        with self._wake:
            self._draining = True
            self._try_at = 0.0
            self._wake.notify_all()
            if self._thread is None or self._ended:
                return not self.maybe_registered
            # the loop does it, unless a call under way, a probe or a stalled Redis uses up the time: then beside it
            if not self._wake.wait_for(self._is_drained, self._timing.drain_s * 0.6):
                threading.Thread(target=self._unregister_out_of_turn, name="unregister", daemon=True).start()
                self._wake.wait_for(self._is_drained, max(0.0, give_up_at - time.monotonic()))
            return self._at_node is False

    def abandon(self) -> None:
        """End without a word to the node: a newer incarnation with the same cid owns the entry now."""
        with self._wake:
            self._ended = self._draining = True
            self._at_node = False
            self._wake.notify_all()

    # ----- the loop

    def _run(self) -> None:
        while True:
            with self._wake:
                now = time.monotonic()
                if self._ended or (self._draining and self._at_node is False):
                    return
                step, due = self._next_step(now)
                probe_at = math.inf if self._draining else self._probe_at
                if min(due, probe_at) > now:
                    wait_s = min(due, probe_at) - now
                    self._wake.wait(None if wait_s == math.inf else wait_s)
                    continue
                # the probe first: what it finds may change the step
                self._doing = "probe" if probe_at <= now else step
            if self._doing == "probe":
                self._look_at_web()
            elif self._doing is not None:
                self._take(self._doing)
            with self._wake:
                self._doing = None
                self._wake.notify_all()

    def _next_step(self, now: float) -> tuple[Step | None, float]:
        """What brings the node's list closer to the truth, and from when on it may be tried."""
        wanted = self._serving and self._web.up and not self._draining
        if wanted != self._wanted_before:
            # news is told at once, whatever the failures of the past
            self._wanted_before = wanted
            self._failures, self._try_at = 0, now
        if not wanted:
            return ("unregister", self._try_at) if self._at_node is not False else (None, math.inf)
        if self._at_node is not True:
            return "register", self._try_at
        # a list that can't be read is replaced by saying the same again: an update, harmless at this pace
        return "register" if self._list_unreadable else "look", max(self._look_at, self._try_at)

    def _look_at_web(self) -> None:
        self._probe_at = time.monotonic() + (
            self._timing.probe_every_s if self._web.ever_up else self._timing.first_probe_every_s
        )
        before = self._web.up
        self._web.saw(self._probe())
        if self._web.up != before:
            log.info("the web process %s", "answers" if self._web.up else "does not answer")

    def _take(self, step: Step) -> None:
        try:
            with self._turn() as mine:
                with self._wake:
                    # waiting for the turn took a while: is it still what should be done?
                    if not (mine or self._draining) or self._next_step(time.monotonic())[0] != step:
                        return
                    # set before the call: a lease that is lost during it asks for another look
                    self._look_at = time.monotonic() + self._timing.look_every_s
                self._succeeded(step, self._perform(step))
        except NodeError as error:
            self._failed(step, error)
        except Exception as error:
            # nobody else would tell the node: this thread outlives whatever its collaborators throw
            log.exception("the registrar failed to %s", step)
            self._failed(step, NodeError("unreachable", f"the registrar failed: {type(error).__name__}"))

    def _perform(self, step: Step) -> bool:
        """Make the call. Whether the node has the entry afterwards. Raises NodeError."""
        assert self._node is not None and self._registration is not None
        ours, timeout_s = self._registration, self._timing.drain_s if self._draining else None
        if step == "look":
            return ours in self._node.models()
        if step == "register":
            self._node.register_model(ours, siblings=self._siblings)
            return True
        self._node.unregister_model(
            ours.project, ours.model, ours.cid, siblings=self._siblings, timeout_s=timeout_s
        )
        return False

    def _unregister_out_of_turn(self) -> None:
        try:
            self._succeeded("unregister", self._perform("unregister"))
        except NodeError as error:
            self._failed("unregister", error)

    # ----- what came of it

    def _succeeded(self, step: Step, at_node: bool) -> None:
        with self._wake:
            if self._ended:
                return  # abandoned during the call: what the node has is another's
            if at_node != self._at_node:
                log.info("%s at the node", "registered" if at_node else "not registered")
            self._at_node = at_node
            self._failures, self._try_at, self._last_error = 0, 0.0, ""
            if step == "register":
                self._list_unreadable = False
            self._wake.notify_all()
        self._tell()

    def _failed(self, step: Step, error: NodeError) -> None:
        with self._wake:
            if self._ended:
                return
            answered = error.kind in ("refused", "too_old")
            self._look_at = 0.0
            if step == "look" and answered:
                self._list_unreadable = True
                return
            if step == "register" and (self._at_node is False or answered):
                self._at_node = None
            if step == "unregister" and self._draining:
                self._drain_failed = True
            if str(error) != self._last_error:
                log.warning("could not %s: %s", "read the node's list" if step == "look" else step, error)
            self._last_error = str(error)
            longest = min(
                self._timing.backoff_most_s, self._timing.backoff_first_s * 2 ** min(self._failures, 16)
            )
            self._failures += 1
            self._try_at = time.monotonic() + longest * random.uniform(0.5, 1.0)
            self._wake.notify_all()
        self._tell()

    def _is_drained(self) -> bool:
        """Off the node, or the node can't be told at the moment. A register still under way may undo the first."""
        return self._drain_failed or (self._at_node is False and self._doing != "register")

    def _tell(self) -> None:
        shown = (self.registered, self._last_error)
        if shown != self._shown:
            self._shown = shown
            try:
                self._on_change()
            except Exception:
                log.exception("telling of a change at the node failed")


def build_registrar(
    settings: Settings,
    entry: ModelEntry,
    *,
    project: str,
    cid: str,
    redis: RedisClient,
    keys: Keys,
    on_change: Callable[[], None],
) -> Registrar:
    """The registrar of the worker `cid`, as the settings have it. Nothing starts yet."""
    leases = Leases(redis, keys)

    def siblings() -> list[Registration]:
        try:
            return [entry for entry in registrations_of(leases.workers(), settings) if entry.cid != cid]
        except RedisError as error:
            # an old node would drop those that we can't name
            raise NodeError("unreachable", f"the other workers are not known: {error}") from error

    return Registrar(
        registration_for(entry, settings, project, cid),
        NodeClient(settings.node_url) if settings.node_url else None,
        http_probe(settings.service_url),
        NodeLock(redis, keys, settings.node_url, settings.service_id).turn,
        on_change,
        siblings=siblings,
    )
