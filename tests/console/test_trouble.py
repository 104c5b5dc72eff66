"""The page when parts are missing: no worker, no Redis, no service, and with many workers in all states."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from protocol.leases import GpuUsage, Leases
from protocol.names import Keys
from tests.console.browser import PHONE, Screen, open_page
from tests.deployment import ECHO_CATALOGUE, Deployment
from tests.records import worker_record

STATES = ["ready", "loading", "draining", "drained", "lost", "dancing"]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A web process and Redis, without workers. The tests may break both, and mend them."""
    folder: Path = tmp_path_factory.mktemp("bare")
    with Deployment(folder, catalogue=ECHO_CATALOGUE.format(step_ms=1, slots=1)) as service:
        yield service.start()


def test_what_is_missing_is_told_and_comes_back(browser: Browser, bare: Deployment) -> None:
    with open_page(browser, bare.url, PHONE) as (page, watch):
        status = page.get_by_role("region", name="Status")
        expect(status).to_contain_text("No worker serves echo and echo-images.")
        expect(page.get_by_role("region", name="Workers")).to_contain_text("No worker runs.")
        expect(page.get_by_role("region", name="Ended requests")).to_contain_text("No request has ended yet.")

        bare.redis.kill()
        expect(status).to_contain_text("Redis can't be reached.")
        bare.redis.start()
        expect(status).not_to_contain_text("Redis can't be reached.")
        expect(status).to_contain_text("No worker serves echo and echo-images.")

        assert bare.web is not None
        bare.web.end()
        expect(status).to_contain_text("The service does not answer. What is shown is from")
        expect(page.get_by_role("region", name="Models")).to_be_visible()
        bare.start_web()
        expect(status).not_to_contain_text("does not answer")
        assert watch.refused, "Chromium tells of the failed requests"


def test_twenty_workers_in_all_states(browser: Browser, bare: Deployment, screen: Screen) -> None:
    keys = Keys.of("Test")
    leases = Leases(bare.redis.client, keys)
    for number in range(20):
        gpu = GpuUsage(memory_used_bytes=70 * 2**30, memory_total_bytes=80 * 2**30, temperature_c=number + 40)
        fields: dict[str, Any] = {"name": f"echo-{number}@a-machine-with-a-rather-long-name.example.org"}
        fields |= {"state": STATES[number % 6], "slots": 64, "running": number, "kv_cache_usage": 0.25}
        fields |= {"registered": number == 2, "tasks": ("embedding",) if number == 3 else ("chat",)}
        fields |= {"gpus": [str(number)], "gpu": gpu, "last_error": "x" * 200 if number % 2 else ""}
        leases.seize_worker(worker_record(f"cid-{number}", **fields))
        bare.redis.client.persist(keys.lease(f"cid-{number}"))
    try:
        with open_page(browser, bare.url, screen) as (page, watch):
            rows = page.get_by_role("region", name="Workers").get_by_role("row")
            expect(rows.filter(has_text="echo-19@")).to_be_visible()
            expect(rows.filter(has_text="@a-machine")).to_have_count(20)
            for number, state in enumerate(STATES):
                worker = rows.filter(has_text=f"echo-{number}@")
                expect(worker).to_contain_text(state)
                expect(worker).to_contain_text("70.0 GiB of 80.0 GiB")
                expect(worker).to_contain_text(f"{number + 40} °C")
                expect(worker).to_contain_text("KV cache 25 %")
            for number, text in ((1, "x" * 200), (2, "registered"), (3, "does not know this task")):
                expect(rows.filter(has_text=f"echo-{number}@")).to_contain_text(text)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
            assert all("/readyz" in text for text in watch.refused), watch.refused
    finally:
        for number in range(20):
            bare.redis.client.delete(keys.lease(f"cid-{number}"))
            leases.forget_worker(f"cid-{number}")


def test_a_worker_that_does_not_run_can_be_resumed(
    browser: Browser, bare: Deployment, screen: Screen
) -> None:
    keys = Keys.of("Test")
    bare.redis.client.sadd(keys.drains, "gone-1@elsewhere")
    with open_page(browser, bare.url, screen) as (page, watch):
        worker = page.get_by_role("row").filter(has_text="gone-1@elsewhere")
        expect(worker).to_contain_text("stopped")
        worker.get_by_role("button", name="Resume").click()
        expect(worker).to_have_count(0)
        assert bare.redis.client.smembers(keys.drains) == set()
        assert all("/readyz" in text for text in watch.refused), watch.refused
