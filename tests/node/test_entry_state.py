"""node.entry_state: which call comes next, for what should be and what is known. Times are made up."""

import math

import pytest

from node.backoff import Backoff
from node.client import NodeRefused, NodeTimeout
from node.entry_state import AtNode, EntryState, Step

READ_EVERY_S = 60.0
TIMEOUT = NodeTimeout("no answer")
REFUSED = NodeRefused("no", 5000)


@pytest.fixture
def entry() -> EntryState:
    """Of a worker that serves; nothing is known of the node."""
    entry = EntryState(READ_EVERY_S, Backoff(8, 32))
    entry.serving = entry.web_up = True
    return entry


@pytest.fixture
def registered(entry: EntryState) -> EntryState:
    entry.next_step(0)
    entry.started(0)
    entry.succeeded(Step.REGISTER, AtNode.PRESENT)
    return entry


@pytest.mark.parametrize("change", [{"serving": False}, {"web_up": False}, {"draining": True}])
def test_it_is_registered_only_while_it_serves_behind_a_web_process(
    registered: EntryState, change: dict[str, bool]
) -> None:
    for name, value in change.items():
        setattr(registered, name, value)

    assert registered.next_step(1) == (Step.UNREGISTER, 0)
    registered.succeeded(Step.UNREGISTER, AtNode.ABSENT)
    assert registered.next_step(1) == (None, math.inf)


def test_at_the_start_an_entry_that_may_be_there_is_removed() -> None:
    assert EntryState(READ_EVERY_S, Backoff(8, 32)).next_step(0) == (Step.UNREGISTER, 0)


def test_the_list_is_read_now_and_then_and_at_once_when_asked(registered: EntryState) -> None:
    assert registered.next_step(1) == (Step.READ_LIST, READ_EVERY_S)
    registered.read_list_soon()
    assert registered.next_step(1) == (Step.READ_LIST, 0)
    registered.succeeded(Step.READ_LIST, AtNode.ABSENT)
    assert registered.next_step(1) == (Step.REGISTER, 0)


def test_a_failed_call_is_repeated_later_and_a_change_of_target_at_once(entry: EntryState) -> None:
    entry.next_step(0)
    entry.failed(Step.REGISTER, REFUSED, 100)
    step, at = entry.next_step(100)
    assert (step, entry.last_error) == (Step.REGISTER, "no")
    assert 104 <= at <= 108

    entry.web_up = False
    assert entry.next_step(100) == (Step.UNREGISTER, 0)


def test_after_a_register_without_success_the_entry_may_be_there(entry: EntryState) -> None:
    entry.at_node = AtNode.ABSENT
    entry.next_step(0)
    entry.failed(Step.REGISTER, TIMEOUT, 0)
    assert entry.at_node is AtNode.UNKNOWN


def test_after_a_failed_call_the_list_is_read_without_waiting_a_minute(registered: EntryState) -> None:
    registered.failed(Step.READ_LIST, TIMEOUT, 1)
    step, at = registered.next_step(1)
    assert step is Step.READ_LIST
    assert at <= 9
    assert registered.at_node is AtNode.PRESENT


def test_a_list_that_is_refused_is_no_error_and_the_entry_is_registered_again(registered: EntryState) -> None:
    registered.started(60)
    registered.failed(Step.READ_LIST, REFUSED, 60)
    assert registered.next_step(60) == (Step.REGISTER, 0)
    assert registered.last_error == ""

    registered.started(60)
    registered.succeeded(Step.REGISTER, AtNode.PRESENT)
    assert registered.next_step(60) == (Step.READ_LIST, 60 + READ_EVERY_S)


def test_a_failed_unregister_ends_the_wait_of_a_drain(registered: EntryState) -> None:
    registered.start_draining()
    assert not registered.drain_failed
    registered.failed(Step.UNREGISTER, TIMEOUT, 1)
    assert registered.drain_failed
    assert registered.at_node is AtNode.PRESENT


def test_waits_double_up_to_a_limit() -> None:
    backoff = Backoff(1, 10)
    waits = []
    for _ in range(6):
        backoff.failed(0)
        waits.append(backoff.retry_at)
    for wait, longest in zip(waits, (1, 2, 4, 8, 10, 10), strict=True):
        assert longest / 2 <= wait <= longest
    backoff.reset()
    assert backoff.retry_at == 0
