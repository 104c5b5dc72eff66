"""Whether one worker's entry should be at the node, whether it is there, and which call comes next.

Makes no calls and has no threads: node/registrar.py makes the calls and reports their results.
"""

import math
from enum import Enum

from node.backoff import Backoff
from node.client import NodeError, NodeRefused


class AtNode(Enum):
    """Whether the node's list has the entry."""

    UNKNOWN = "unknown"
    """At the start, when an earlier incarnation may have left it there, and after a register that failed."""
    ABSENT = "absent"
    PRESENT = "present"


class Step(Enum):
    """A call to the node, as it reads after "could not"."""

    REGISTER = "register"
    UNREGISTER = "unregister"
    READ_LIST = "read the node's list"


class EntryState:
    """The entry should be at the node while `serving`, `web_up` and not `draining`. Times: time.monotonic().

    The node's list is read every `read_every_s` seconds, in case somebody else has removed or changed the
    entry.
    """

    def __init__(self, read_every_s: float, backoff: Backoff) -> None:
        self.serving = False
        self.web_up = False
        self.draining = False
        self.at_node = AtNode.UNKNOWN
        self.drain_failed = False
        self.last_error = ""
        self._read_every_s = read_every_s
        self._backoff = backoff
        self._read_at = 0.0
        self._list_unreadable = False
        self._wanted = False

    def next_step(self, now: float) -> tuple[Step | None, float]:
        """The call that makes the node's list right, and the time from which on it may be made."""
        wanted = self.serving and self.web_up and not self.draining
        if wanted != self._wanted:
            # the target state changed: retry now and reset the backoff
            self._wanted = wanted
            self._backoff.reset()
        if not wanted and self.at_node is AtNode.ABSENT:
            return None, math.inf
        if not wanted:
            return Step.UNREGISTER, self._backoff.retry_at
        if self.at_node is not AtNode.PRESENT:
            return Step.REGISTER, self._backoff.retry_at
        # where the list can't be read the entry is registered again instead, which updates it
        step = Step.REGISTER if self._list_unreadable else Step.READ_LIST
        return step, max(self._read_at, self._backoff.retry_at)

    def start_draining(self) -> None:
        """Note that the entry must go and never come back; the next step may be taken at once."""
        self.draining = True
        self._backoff.reset()

    def read_list_soon(self) -> None:
        """Let the list be read: somebody else may have removed the entry."""
        self._read_at = 0.0

    def started(self, now: float) -> None:
        """Note that a call is about to be made: a `read_list_soon` from now on asks for a read after it."""
        self._read_at = now + self._read_every_s

    def succeeded(self, step: Step, at_node: AtNode) -> None:
        """Note that a call was made; what the node's list has of the entry is known then."""
        self.at_node = at_node
        self.last_error = ""
        self._backoff.reset()
        if step is Step.REGISTER:
            self._list_unreadable = False

    def failed(self, step: Step, error: NodeError, now: float) -> None:
        """Note that a call failed; later ones find out what it leaves unknown."""
        refused = isinstance(error, NodeRefused)
        self._read_at = 0.0
        if step is Step.READ_LIST and refused:
            self._list_unreadable = True
            return
        if step is Step.REGISTER and (refused or self.at_node is AtNode.ABSENT):
            self.at_node = AtNode.UNKNOWN
        if step is Step.UNREGISTER and self.draining:
            self.drain_failed = True
        self.last_error = str(error)
        self._backoff.failed(now)
