"""The operator's view, by real clicks in Chromium: what it shows of a running service, and drains."""

import re

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.console.browser import PHONE, Screen, open_page, row
from tests.console.conftest import CLIENT_KEY, KEY
from tests.deployment import Deployment


def number_of(page: Page, of: str) -> int:
    """The largest number that the plot of requests has for `of`, from its description."""
    label = page.get_by_role("img", name=re.compile("^Requests over")).get_attribute("aria-label") or ""
    found = re.search(rf"{of}: \d+ last, (\d+) at most", label)
    return int(found[1]) if found else -1


def test_ended_requests_come_by_themselves(browser: Browser, service: Deployment, screen: Screen) -> None:
    with open_page(browser, service.url, screen) as (page, watch):
        expect(page.get_by_role("heading", name="Ended requests")).to_be_visible()
        stream = service.stream("Hi", "echo", max_tokens=7)
        request_id = next(stream.events())["id"]
        assert stream.text() and stream.done
        chat = row(page, "Ended requests", request_id)
        for text in ("completed", "chat", "7 tokens", "tokens/s", "ms", "echo-1@"):
            expect(chat).to_contain_text(text)

        left = service.stream("Hi", "echo", max_tokens=100000)
        left_id = next(left.events())["id"]
        left.close()
        expect(row(page, "Ended requests", left_id)).to_contain_text("client left")
        page.get_by_label("Only those that did not complete").check()
        expect(row(page, "Ended requests", request_id)).to_have_count(0)
        expect(row(page, "Ended requests", left_id)).to_be_visible()
        page.get_by_label("Only those that did not complete").uncheck()
        page.get_by_label("Show").select_option("echo-images")
        expect(row(page, "Ended requests", request_id)).to_have_count(0)
        page.get_by_label("Show").select_option("")
        expect(row(page, "Ended requests", request_id)).to_be_visible()
        assert watch.refused == []


def test_queues_and_first_tokens_are_plotted(browser: Browser, service: Deployment, screen: Screen) -> None:
    streams = [service.stream("Hi", "echo", max_tokens=100000) for _ in range(2)]
    for stream in streams:
        next(stream.events())
    with open_page(browser, service.url, screen) as (page, watch):
        model = row(page, "Models", "echo").first
        expect(model).to_contain_text("1 ready")
        page.wait_for_function(
            "() => /Running: 2 last/.test(document.querySelector('[role=img]')?.getAttribute('aria-label'))"
        )
        drawn = page.locator(".uplot canvas").first.evaluate("canvas => canvas.toDataURL()")
        for stream in streams:
            stream.close()
        page.wait_for_function(
            "() => /Running: 0 last/.test(document.querySelector('[role=img]')?.getAttribute('aria-label'))"
        )
        assert number_of(page, "Running") >= 2
        page.wait_for_function(
            "drawn => document.querySelector('.uplot canvas').toDataURL() !== drawn", arg=drawn
        )
        times = page.get_by_role("img", name=re.compile("^Time to first token over"))
        expect(times).to_have_attribute("aria-label", re.compile(r"Median: [\d.]+ m?s last"))
        pixels = """canvas => new Set(new Uint32Array(
            canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size"""
        assert page.locator(".uplot canvas").count() == 2
        assert all(canvas.evaluate(pixels) > 2 for canvas in page.locator(".uplot canvas").all()), "drawn"
        assert watch.refused == []


def test_a_worker_is_drained_and_resumed_by_clicks(
    browser: Browser, service: Deployment, screen: Screen
) -> None:
    with open_page(browser, service.url, screen) as (page, watch):
        worker = row(page, "Workers", "echo-1@")
        worker.get_by_role("button", name="Drain echo-1").click()
        expect(worker).to_contain_text("No other worker of echo is ready")
        worker.get_by_role("button", name="Keep it").click()
        drain = worker.get_by_role("button", name="Drain echo-1")
        expect(drain).to_be_focused()
        drain.click()
        yes = worker.get_by_role("button", name="Drain it")
        expect(yes).to_be_focused()
        yes.press("Enter")
        expect(worker).to_contain_text("drained")
        expect(page.get_by_role("region", name="Status")).to_contain_text("under drain")
        expect(page.get_by_role("region", name="Status")).to_contain_text("No worker serves echo.")
        resume = worker.get_by_role("button", name="Resume")
        expect(resume).to_be_focused()
        resume.press("Enter")
        expect(worker).to_contain_text("ready")
        expect(page.get_by_role("region", name="Status")).to_contain_text("Ready: every model has a worker.")
        # 503 while no worker serves the model
        assert all("/readyz" in text for text in watch.refused), watch.refused


def test_a_refused_drain_says_why(browser: Browser, service: Deployment) -> None:
    headers = {"X-Forwarded-For": "192.0.2.1"}
    with open_page(browser, service.url, extra_http_headers=headers) as (page, watch):
        worker = row(page, "Workers", "echo-1@")
        worker.get_by_role("button", name="Drain").click()
        worker.get_by_role("button", name="Drain it").click()
        expect(page.get_by_role("alert")).to_contain_text("allowed from the machine itself only")
        expect(worker).to_contain_text("ready")
        assert len(watch.refused) == 1 and "403" in watch.refused[0]


@pytest.mark.parametrize("key", [KEY, CLIENT_KEY])
def test_what_a_key_may_see(browser: Browser, keyed: Deployment, key: str) -> None:
    with open_page(browser, keyed.url, PHONE) as (page, watch):
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use this key").click()
        worker = row(page, "Workers", "echo-1@")
        expect(worker).to_contain_text("ready")
        if key == KEY:
            expect(worker.get_by_role("button", name="Drain")).to_be_visible()
            expect(page.get_by_role("heading", name="Ended requests")).to_be_visible()
        else:
            expect(page.get_by_text("This key is a client's.")).to_be_visible()
            expect(page.get_by_role("button", name="Drain")).to_have_count(0)
            assert any("403" in text for text in watch.refused)


def test_a_hidden_tab_asks_nothing_and_asks_at_once_when_it_is_seen(
    browser: Browser, service: Deployment
) -> None:
    hide = """hidden => {
        Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    asked: list[str] = []
    with open_page(browser, service.url) as (page, watch):
        expect(row(page, "Workers", "echo-1@")).to_contain_text("ready")
        page.clock.install()
        page.reload()
        expect(row(page, "Workers", "echo-1@")).to_contain_text("ready")
        page.evaluate(hide, True)
        page.wait_for_load_state("networkidle")
        page.on("request", lambda request: asked.append(request.url))
        page.clock.run_for(60_000)
        page.evaluate("() => fetch('/healthz')")
        assert [url for url in asked if "healthz" not in url] == []
        with page.expect_response("**/v1/activity**"):
            page.evaluate(hide, False)
        assert watch.refused == []


def test_numbers_and_quantiles(browser: Browser, service: Deployment) -> None:
    with open_page(browser, service.url) as (page, _):
        texts = page.evaluate("""async () => {
            const { ago, duration, gibibytes, rate } = await import("/static/js/format.js");
            return [[0, 84.4, 999, 1240, 61000, 125000, null].map(duration),
                [0.2, 12.9, 300, 7300].map(ago), gibibytes(2 ** 31), rate(70, 2000), rate(900, 1000)];
        }""")
        assert texts == [
            ["0 ms", "84 ms", "999 ms", "1.24 s", "61.0 s", "2 min 5 s", "–"],
            ["now", "12 s ago", "5 min ago", "2 h ago"],
            "2.0 GiB",
            "35.0 tokens/s",
            "900 tokens/s",
        ]
        found = page.evaluate("""async () => {
            const { firstTokens, series } = await import("/static/js/activity.js");
            const of = (waiting, classes) => ({ waiting, running: 1, first_token_ms: classes });
            const activity = { now: 1003, queues: [], samples: new Map([
                [1000, { a: of(2, { 100: 1 }), b: of(3, { 1000: 1 }) }],
                [995, { a: of(0, { 100: 98 }) }],
                [400, { a: of(9, { 9000: 1000 }) }],
            ]) };
            const lines = series(activity, "");
            return { all: firstTokens(activity, "", 60), b: firstTokens(activity, "b", 60),
                none: firstTokens(activity, "c", 60), at: lines.at.at(-1), number: lines.at.length,
                waiting: lines.waiting.slice(-3), of_a: series(activity, "a").waiting.slice(-2) };
        }""")
        assert 83 <= found["all"]["median"] <= 100 and found["all"]["high"] <= 100
        assert found["all"]["requests"] == 100
        assert 833 <= found["b"]["median"] <= 1000
        assert found["none"] == {"median": None, "high": None, "requests": 0}
        assert (found["at"], found["number"]) == (1000, 180)
        assert found["waiting"] == [None, 0, 5] and found["of_a"] == [0, 2]
