"""The page itself: what it loads, its policy, its key, its views. By real clicks in Chromium."""

import hashlib
import re
from contextlib import closing

from playwright.sync_api import Browser, expect

from app.console.routes import POLICY
from tests.console.browser import Screen, open_page, row
from tests.console.conftest import KEY
from tests.deployment import ROOT, Deployment

VENDOR = ROOT / "app/console/static/vendor"


def test_the_page_shows_the_workers(browser: Browser, service: Deployment, screen: Screen) -> None:
    with open_page(browser, service.url, screen) as (page, watch):
        chat = row(page, "Workers", "echo-1@")
        expect(chat).to_contain_text("ready")
        expect(chat).to_contain_text("registered")
        expect(row(page, "Workers", "echo-images-2@")).to_contain_text("ready")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
        assert watch.refused == []


def test_both_views_are_reached_by_clicks_and_by_keyboard(
    browser: Browser, service: Deployment, screen: Screen
) -> None:
    with open_page(browser, service.url, screen) as (page, watch):
        page.get_by_role("link", name="Playground").click()
        expect(page.get_by_role("heading", name="Playground")).to_be_attached()
        expect(page).to_have_title(re.compile("Playground"))
        page.get_by_role("link", name="Console").press("Enter")
        expect(page.get_by_role("heading", name="Workers")).to_be_visible()
        assert watch.refused == []


def test_the_policy_and_that_nothing_needs_a_key(keyed: Deployment) -> None:
    paths = ["/", "/static/icon.svg", "/static/js/main.js", "/static/vendor/preact.js"]
    for path in paths:
        response, connection = keyed.request("GET", path)
        with closing(connection):
            body = response.read()
        assert (response.status, bool(body)) == (200, True), path
        assert response.headers["Content-Security-Policy"] == POLICY
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert keyed.web is not None
    log = keyed.web.log.read_text()
    assert "route=/ " in log and "/static/" not in log, "one line for a page, not one for each of its files"
    assert "default-src 'none'" in POLICY and "unsafe" not in POLICY
    for path in (
        "/static/",
        "/static/../templates/console.html",
        "/static/%2e%2e/templates/console.html",
        "/static/nothing.js",
    ):
        response, connection = keyed.request("GET", path)
        with closing(connection):
            assert response.status in (401, 404), path
            response.read()


def test_a_key_is_asked_for_once_and_stays_in_the_tab(
    browser: Browser, keyed: Deployment, screen: Screen
) -> None:
    with open_page(browser, keyed.url, screen) as (page, watch):
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        expect(page.get_by_role("row")).to_have_count(0)
        field.fill("wrong")
        page.get_by_role("button", name="Use this key").click()
        expect(page.get_by_role("alert")).to_contain_text("does not know this key")
        field.fill(f" {KEY} ")
        field.press("Enter")
        expect(row(page, "Workers", "echo-1@")).to_contain_text("ready")
        expect(field).to_have_count(0)

        page.reload()
        expect(row(page, "Workers", "echo-1@")).to_contain_text("ready")
        assert all("401" in text for text in watch.refused) and len(watch.refused) == 2

        other = page.context.new_page()
        other.goto(keyed.url)
        expect(other.get_by_label("API key")).to_be_focused()
        other.close()

        page.get_by_role("button", name="Forget key").click()
        expect(page.get_by_label("API key")).to_be_focused()
        page.reload()
        expect(page.get_by_label("API key")).to_be_focused()


def test_vendored_files_are_those_that_were_fetched() -> None:
    lines = [line.split() for line in (VENDOR / "SHA256SUMS").read_text().splitlines()]
    found = {name: hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() for _, name in lines}
    assert found == {name: digest for digest, name in lines}
    files = {path.name for path in VENDOR.iterdir()} - {"SHA256SUMS", "README.md"}
    assert files == set(found)
    for name in ("preact", "htm", "uplot", "markdown-it", "dompurify", "swagger-ui"):
        assert f"{name}.LICENSE" in files
