"""Headless Chromium for tests of the page, and a watch over everything that it does."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
"""Debian's, which scripts/test installs where it can."""
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_MS = 30_000
"""The limit on each wait for something to appear, for slow machines."""
expect.set_options(timeout=WAIT_MS)


class Screen(NamedTuple):
    """A size of the window in CSS pixels. `touch`: operated with a finger."""

    width: int
    height: int
    touch: bool = False


DESKTOP = Screen(1280, 860)
PHONE = Screen(390, 844, touch=True)

_REPORT_VIOLATIONS = """
document.addEventListener("securitypolicyviolation", (event) =>
  console.error(`CSP: ${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}:${event.lineNumber}`));
"""


class Watch:
    """What a page has done wrong: errors on its console, violations of the policy, requests to other
    hosts."""

    def __init__(self, page: Page, url: str) -> None:
        self._origin = urlsplit(url)[:2]
        self.errors: list[str] = []
        self.refused: list[str] = []
        """Errors that Chromium itself writes for each response above 399 and each failed request."""
        self.hosts: set[str] = set()
        page.on("console", self._note_message)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._note_request)

    def check(self) -> None:
        """Raise AssertionError unless the page was clean. Refused requests are for the test to judge."""
        assert not self.errors, self.errors
        assert not self.hosts, f"the page asked other hosts: {self.hosts}"

    def _note_message(self, message: ConsoleMessage) -> None:
        if message.type not in ("error", "warning"):
            return
        is_refusal = message.text.startswith("Failed to load resource")
        (self.refused if is_refusal else self.errors).append(f"{message.text} {message.location}")

    def _note_request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("blob", "data") and parts[:2] != self._origin:
            self.hosts.add(request.url)


class WatchedPage(NamedTuple):
    page: Page
    watch: Watch


def row(page: Page, table: str, text: str) -> Locator:
    """The row with `text` in the table under the heading `table`."""
    return page.get_by_role("region", name=table).get_by_role("row").filter(has_text=text)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start Debian's Chromium. Ends it at the end of the block."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(browser: Browser, url: str, screen: Screen = DESKTOP, **options: Any) -> Iterator[WatchedPage]:
    """Open `url` in a window of its own, with its own storage; at the end check that the page was clean.

    `options`: those of Browser.new_context, such as color_scheme="dark".
    """
    context = browser.new_context(
        viewport={"width": screen.width, "height": screen.height},
        has_touch=screen.touch,
        is_mobile=screen.touch,
        **options,
    )
    try:
        context.set_default_timeout(WAIT_MS)
        context.add_init_script(_REPORT_VIOLATIONS)
        page = context.new_page()
        watch = Watch(page, url)
        page.goto(url)
        yield WatchedPage(page, watch)
        watch.check()
    finally:
        context.close()
