"""protocol.resumable_streams on a real Redis: who reads a stream, who may, and for how long it is kept."""

from typing import Any

import pytest
import redis

from protocol import events
from protocol.errors import QueueUnavailable, TakenOver
from protocol.event_router import EventRouter, Inbox
from protocol.events import Delta, Envelope, Event, Failed
from protocol.names import Keys
from protocol.resumable_streams import REPLAY_LONGER_S, ResumableStreams, StreamRecord, reader_name
from tests.deployment import wait_until

RECORD = StreamRecord(
    model="m", n=1, include_usage=True, created=7, deadline_s=170.0, queued_s=0.5, first_token_s=1.5
)
TTL_S, GRACE_S = 300, 20


class Streams(ResumableStreams):
    """With a stream `r` that "web-1:a" reads, and two events in its replay list."""

    def __init__(self, client: Any, keys: Keys) -> None:
        super().__init__(client, keys, ttl_s=TTL_S)
        self.redis = client
        self.names = keys.stream("r"), keys.replay("r")
        for seq in (1, 0, 1):
            client.rpush(keys.replay("r"), events.encode(Envelope("r", seq, Delta(str(seq)))))
        client.expire(keys.replay("r"), 1000)
        self.begin("r", RECORD, reader="web-1:a", owner="k", grace_s=GRACE_S, elapsed_s=2.0)

    def ttls(self) -> list[int]:
        return [self.redis.ttl(name) for name in self.names]


@pytest.fixture
def streams(redis_client: Any, keys: Keys) -> Streams:
    return Streams(redis_client, keys)


def near(found: list[int], *wanted: int) -> bool:
    return all(want - 15 < ttl <= want for ttl, want in zip(found, wanted, strict=True))


def test_another_reader_takes_over_with_all_that_it_needs(streams: Streams) -> None:
    found = streams.take_over("r", reader="web-2:b", owner="k")
    assert found is not None
    assert found.record == RECORD
    assert 2 <= found.elapsed_s < 60
    assert found.reader_before == "web-1:a"
    assert [envelope.seq for envelope in found.envelopes] == [0, 1, 1]
    assert streams.readers(["r", "unknown"]) == ["web-2:b", None]
    assert near(streams.ttls(), TTL_S, TTL_S)


def test_only_the_owner_of_a_known_stream_gets_it(streams: Streams) -> None:
    assert streams.take_over("r", reader="web-2:b", owner="other") is None
    assert streams.take_over("r", reader="web-2:b", owner="") is None
    assert streams.take_over("unknown", reader="web-2:b", owner="k") is None
    assert streams.take_over("unknown", reader="web-2:b", owner="") is None
    assert streams.readers(["r", "unknown"]) == ["web-1:a", None]


def test_the_grace_period_begins_when_the_reader_leaves_and_ends_when_one_comes_back(
    streams: Streams,
) -> None:
    streams.leave("r", "web-1:a", finished=False)
    assert streams.readers(["r"]) == [""]
    assert near(streams.ttls(), GRACE_S, GRACE_S + REPLAY_LONGER_S)
    assert streams.take_over("r", reader="web-2:b", owner="k") is not None
    assert near(streams.ttls(), TTL_S, TTL_S)


def test_a_reader_that_was_replaced_does_nothing_when_it_leaves(streams: Streams) -> None:
    streams.take_over("r", reader="web-1:b", owner="k")
    streams.leave("r", "web-1:a", finished=False)
    assert streams.readers(["r"]) == ["web-1:b"]
    assert near(streams.ttls(), TTL_S, TTL_S)


def test_reading_a_finished_stream_does_not_keep_it_longer(streams: Streams) -> None:
    streams.leave("r", "web-1:a", finished=True)
    assert near(streams.ttls(), GRACE_S, GRACE_S + REPLAY_LONGER_S)
    for name in streams.names:
        streams.redis.expire(name, 3)
    found = streams.take_over("r", reader="web-2:b", owner="k")
    assert found is not None and found.envelopes
    streams.leave("r", "web-2:b", finished=True)
    assert near(streams.ttls(), 3, 3)


def test_a_redis_that_is_gone_is_the_client_s_error(keys: Keys) -> None:
    streams = ResumableStreams(redis.Redis(port=1), keys, ttl_s=1)
    with pytest.raises(QueueUnavailable):
        streams.take_over("r", reader="w:a", owner="")
    with pytest.raises(QueueUnavailable):
        streams.begin("r", RECORD, reader="w:a", owner="", grace_s=1, elapsed_s=0.0)


def read_by(router: EventRouter, connection: str) -> Inbox:
    inbox = router.open("r", "m")
    inbox.reader = reader_name("web-2", connection)
    inbox.feed(Envelope("r", 0, Delta("a")))
    return inbox


def arrived(inbox: Inbox) -> list[Event]:
    wait_until(lambda: inbox.ended, timeout_s=60, what="the reader is told")
    return inbox.next_events(0)


@pytest.mark.parametrize("teller", ["web-1", "web-2"])
def test_a_reader_is_told_that_another_has_taken_over(redis_client: Any, keys: Keys, teller: str) -> None:
    router = EventRouter(redis_client, keys, "web-2")
    router.start()
    try:
        assert router.subscribed.wait(30)
        inbox = read_by(router, "a")
        other = router if teller == "web-2" else EventRouter(redis_client, keys, teller)
        other.tell_taken_over("r", "web-2:before")
        other.tell_taken_over("r", "")
        redis_client.publish(keys.channel("web-2"), events.encode([Envelope("r", 1, Delta("b"))]))
        wait_until(lambda: inbox.next_seq == 2, timeout_s=20, what="nobody has told this one")
        router.close(Inbox("r", "m"))
        assert router.inboxes() == [inbox]
        other.tell_taken_over("r", "web-2:a")
        assert arrived(inbox) == [Delta("a"), Delta("b"), Failed.of(TakenOver())]
    finally:
        router.stop()
