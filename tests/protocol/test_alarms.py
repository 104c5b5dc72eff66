"""protocol.alarms on a real Redis."""

from typing import Any

import pytest

from protocol import alarms as alarms_module
from protocol.alarms import ALARM_TTL_S, Alarms
from protocol.names import Keys
from tests.deployment import wait_until


@pytest.fixture
def alarms(redis_client: Any, keys: Keys) -> Alarms:
    return Alarms(redis_client, keys)


def test_alarms_of_several_supervisors_stand_beside_each_other(
    alarms: Alarms, redis_client: Any, keys: Keys
) -> None:
    alarms.renew({"b is down"})
    Alarms(redis_client, keys).renew({"a is down"})
    assert alarms.current() == ["a is down", "b is down"]
    alarms.renew(set(), ended={"b is down"})
    assert alarms.current() == ["a is down"]
    assert 0 < redis_client.ttl(keys.alarms) <= ALARM_TTL_S


def test_an_alarm_that_nobody_renews_expires_beside_one_that_is_renewed(
    alarms: Alarms, redis_client: Any, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarms_module, "ALARM_TTL_S", 1)
    alarms.renew({"left"})
    assert alarms.current() == ["left"]
    monkeypatch.setattr(alarms_module, "ALARM_TTL_S", 60)
    alarms.renew({"kept"})
    wait_until(lambda: alarms.current() == ["kept"], timeout_s=20, what="one has expired")
    alarms.renew({"kept"})
    assert redis_client.zcard(keys.alarms) == 1
