"""The page /docs: the API's description in Swagger UI, under the console's policy.

By real clicks in Chromium.
"""

import re
from contextlib import closing

from playwright.sync_api import Browser, Page, expect

from app.console.routes import POLICY
from tests.console.browser import PHONE, Screen, open_page
from tests.console.conftest import CLIENT_KEY
from tests.deployment import Deployment

CHAT = "#operations-Text-createChatCompletion"


def try_chat(page: Page) -> None:
    """Open the endpoint, and send its first example to the service."""
    chat = page.locator(CHAT)
    chat.get_by_role("button", name="/v1/chat/completions").first.click()
    chat.get_by_role("button", name="Try it out").click()
    expect(chat.get_by_role("textbox").last).to_have_value(re.compile("What is the capital of France"))
    chat.get_by_role("button", name="Execute").click()
    live = chat.locator(".live-responses-table")
    expect(live.locator(".response-col_status").last).to_contain_text("200")
    expect(live).to_contain_text("0 1 2")


def test_an_endpoint_is_shown_and_tried(browser: Browser, service: Deployment, screen: Screen) -> None:
    with open_page(browser, f"{service.url}/docs", screen) as (page, watch):
        expect(page.get_by_role("heading", name="Model service")).to_be_visible()
        try_chat(page)
        expect(page.locator(".servers")).to_contain_text(service.url)
        assert watch.refused == []


def test_every_endpoint_is_in_the_list(browser: Browser, service: Deployment) -> None:
    paths = service.get("/openapi.json")[1]["paths"]
    with open_page(browser, f"{service.url}/docs") as (page, _):
        expect(page.locator(".opblock")).to_have_count(sum(map(len, paths.values())))
        shown = page.locator(".opblock-summary-path").evaluate_all("all => all.map(one => one.dataset.path)")
        assert set(shown) == set(paths)


def test_nothing_is_wider_than_a_phone(browser: Browser, service: Deployment) -> None:
    with open_page(browser, f"{service.url}/docs", PHONE) as (page, _):
        try_chat(page)
        closed = page.locator(".opblock:not(.is-open) .opblock-summary-control")
        for _ in range(closed.count()):
            closed.first.click()
        expect(page.locator(".opblock.is-open .opblock-body")).to_have_count(page.locator(".opblock").count())
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE.width


def test_the_page_is_dark_where_others_are(browser: Browser, service: Deployment) -> None:
    with open_page(browser, f"{service.url}/docs", color_scheme="dark") as (page, _):
        title = page.get_by_role("heading", name="Model service")
        expect(title).to_be_visible()
        bright, dark = (
            page.evaluate(f"getComputedStyle(document.querySelector('{name}')).{field}")
            for name, field in ((".info .title", "color"), ("body", "backgroundColor"))
        )
        assert dark == "rgb(28, 32, 34)"
        assert bright != "rgb(59, 65, 81)", "the colour of the bright scheme"


def test_a_key_is_asked_for_and_used(browser: Browser, keyed: Deployment) -> None:
    with open_page(browser, f"{keyed.url}/docs") as (page, watch):
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        field.fill("wrong")
        page.get_by_role("button", name="Use this key").click()
        expect(page.get_by_role("alert")).to_contain_text("does not know this key")
        field.fill(CLIENT_KEY)
        field.press("Enter")
        try_chat(page)
        assert all("401" in text for text in watch.refused) and len(watch.refused) == 2


def test_the_page_has_the_policy_of_the_console(keyed: Deployment) -> None:
    for path in ("/docs", "/static/vendor/swagger-ui.js"):
        response, connection = keyed.request("GET", path)
        with closing(connection):
            assert response.read()
        assert response.status == 200
        assert response.headers["Content-Security-Policy"] == POLICY
