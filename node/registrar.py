"""Keeps one worker's entry at the node while the worker serves and the web process answers.

One daemon thread compares what should be with what is known of the node, and makes one call at a time until
they agree, without end and without anybody waiting for it. Only the worker registers itself; entries of
workers that were killed are removed by node/reconciler.py.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from node.backoff import Backoff
from node.client import NodeClient, NodeError
from node.entry_state import AtNode, EntryState, Step
from node.registration import Registration
from node.web_watch import WebWatch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timing:
    """Periods in seconds. `drain_s`: the longest that `Registrar.drain` takes."""

    first_probe_every_s: float = 1.0
    probe_every_s: float = 5.0
    read_list_every_s: float = 60.0
    backoff_first_s: float = 0.5
    backoff_max_s: float = 30.0
    drain_s: float = 2.0


class Registrar:
    """The owner of one entry.

    `probe` says why the web process can't be called, "" if it can, and never raises; `take_turn` gives the
    node to one process at a time; `on_change` is called, from any thread and without locks held, when
    `registered` or `last_error` has changed.
    """

    def __init__(
        self,
        registration: Registration,
        node: NodeClient,
        probe: Callable[[], str],
        take_turn: Callable[[], AbstractContextManager[bool]],
        on_change: Callable[[], None],
        *,
        timing: Timing | None = None,
    ) -> None:
        self._registration = registration
        self._node = node
        self._probe = probe
        self._take_turn = take_turn
        self._on_change = on_change
        self._timing = timing or Timing()
        backoff = Backoff(self._timing.backoff_first_s, self._timing.backoff_max_s)
        self._entry = EntryState(self._timing.read_list_every_s, backoff)
        self._web = WebWatch()
        self._probe_at = 0.0
        self._changed = threading.Condition()
        """Guards the attributes below and the entry's state; notified when any of them changes."""
        self._thread: threading.Thread | None = None
        self._step: Step | None = None
        self._ended = False
        self._shown = (False, "")

    @property
    def registered(self) -> bool:
        """Whether the node has accepted the registration, and no later call has removed it."""
        return self._entry.at_node is AtNode.PRESENT

    @property
    def maybe_registered(self) -> bool:
        """Whether the node has the entry, or may have it: then somebody must still remove it."""
        return self._entry.at_node is not AtNode.ABSENT

    @property
    def last_error(self) -> str:
        """Why the node's list isn't as it should be, or the worker not registered, in one line; or ""."""
        return self._entry.last_error or (self._web.error if self._entry.serving else "")

    def start(self) -> None:
        """Begin. The entry of an earlier incarnation is removed until this one serves."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="registrar", daemon=True)
            self._thread.start()

    def set_serving(self, serving: bool) -> None:
        """Note whether the worker serves: only then is it registered."""
        with self._changed:
            self._entry.serving = serving
            self._changed.notify_all()

    def lease_was_lost(self) -> None:
        """Have the list read: the lease had expired, and the reconciler may have removed the entry."""
        with self._changed:
            self._entry.read_list_soon()
            self._changed.notify_all()

    def drain(self) -> bool:
        """Remove the entry and never register again. Returns within `drain_s` whether it is gone.

        If not, the call is repeated while the process lives; after that the reconciler removes the entry.
        """
        give_up_at = time.monotonic() + self._timing.drain_s
        with self._changed:
            self._entry.start_draining()
            self._changed.notify_all()
            if self._thread is None or self._ended:
                return not self.maybe_registered
            # the thread does it; if a call in progress, a probe or a stalled Redis delays it, another one
            if not self._changed.wait_for(self._drain_has_ended, self._timing.drain_s * 0.6):
                threading.Thread(target=self._unregister_out_of_turn, name="unregister", daemon=True).start()
                self._changed.wait_for(self._drain_has_ended, max(0.0, give_up_at - time.monotonic()))
            return not self.maybe_registered

    def abandon(self) -> None:
        """End without a call: a newer incarnation with the same cid owns the entry now."""
        with self._changed:
            self._ended = self._entry.draining = True
            self._entry.at_node = AtNode.ABSENT
            self._changed.notify_all()

    def _drain_has_ended(self) -> bool:
        """Unregistered, or that failed. A register in progress may undo the first."""
        unregistered = self._entry.at_node is AtNode.ABSENT and self._step is not Step.REGISTER
        return unregistered or self._entry.drain_failed

    # ----- the thread

    def _run(self) -> None:
        while True:
            with self._changed:
                entry, now = self._entry, time.monotonic()
                if self._ended or (entry.draining and entry.at_node is AtNode.ABSENT):
                    return
                step, due_at = entry.next_step(now)
                probe_at = math.inf if entry.draining else self._probe_at
                wait_s = min(due_at, probe_at) - now
                if wait_s > 0:
                    self._changed.wait(None if wait_s == math.inf else wait_s)
                    continue
                # the probe first: its result may change the step
                probing = probe_at <= now
                self._step = None if probing else step
            if probing:
                self._probe_web()
            elif step is not None:
                self._take(step)
            with self._changed:
                self._step = None
                self._changed.notify_all()

    def _probe_web(self) -> None:
        timing = self._timing
        every_s = timing.probe_every_s if self._web.ever_up else timing.first_probe_every_s
        self._probe_at = time.monotonic() + every_s
        before = self._web.error
        self._web.add(self._probe())
        with self._changed:
            self._entry.web_up = self._web.up
        if self._web.error != before:
            log.info("%s", self._web.error or "the web process answers")
        self._report_change()

    def _take(self, step: Step) -> None:
        try:
            with self._take_turn() as mine:
                with self._changed:
                    now = time.monotonic()
                    # waiting for the turn took a while, in which the step may have changed
                    if not (mine or self._entry.draining) or self._entry.next_step(now)[0] is not step:
                        return
                    self._entry.started(now)
                self._succeeded(step, self._call(step))
        except NodeError as error:
            self._failed(step, error)
        except Exception as error:
            # no other thread keeps the entry, so this one must go on
            log.exception("the registrar failed: %s", step.value)
            self._failed(step, NodeError(f"the registrar failed: {type(error).__name__}"))

    def _call(self, step: Step) -> AtNode:
        """Make the call; whether the node has the entry afterwards. Raises NodeError."""
        ours = self._registration
        if step is Step.READ_LIST:
            return AtNode.PRESENT if ours in self._node.models() else AtNode.ABSENT
        if step is Step.REGISTER:
            self._node.register_model(ours)
            return AtNode.PRESENT
        timeout_s = self._timing.drain_s if self._entry.draining else None
        self._node.unregister_model(ours.project, ours.model, ours.cid, timeout_s=timeout_s)
        return AtNode.ABSENT

    def _unregister_out_of_turn(self) -> None:
        try:
            self._succeeded(Step.UNREGISTER, self._call(Step.UNREGISTER))
        except NodeError as error:
            self._failed(Step.UNREGISTER, error)

    def _succeeded(self, step: Step, at_node: AtNode) -> None:
        with self._changed:
            if self._ended:
                return  # abandoned during the call: the entry belongs to another incarnation
            if at_node is not self._entry.at_node:
                log.info("%s is %s at the node", self._registration.cid, at_node.value)
            self._entry.succeeded(step, at_node)
            self._changed.notify_all()
        self._report_change()

    def _failed(self, step: Step, error: NodeError) -> None:
        with self._changed:
            if self._ended:
                return
            before = self._entry.last_error
            self._entry.failed(step, error, time.monotonic())
            if self._entry.last_error != before:
                log.warning("could not %s: %s", step.value, error)
            self._changed.notify_all()
        self._report_change()

    def _report_change(self) -> None:
        shown = (self.registered, self.last_error)
        if shown == self._shown:
            return
        self._shown = shown
        try:
            self._on_change()
        except Exception:
            log.exception("reporting a change at the node failed")


class NoRegistrar:
    """Replaces a Registrar where there is no node, or no type for the model. Does nothing."""

    registered = maybe_registered = False
    last_error = ""

    def start(self) -> None: ...
    def set_serving(self, serving: bool) -> None: ...
    def lease_was_lost(self) -> None: ...
    def abandon(self) -> None: ...

    def drain(self) -> bool:
        return True
