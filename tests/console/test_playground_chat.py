"""Chats in the playground, by real clicks: Markdown, hostile answers, reasoning, stop, failures,
parameters."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.console.browser import DESKTOP, PHONE, Screen, open_page
from tests.console.conftest import KEY
from tests.deployment import Deployment, wait_until
from tests.engines import chat_templates as templates
from tests.engines.tiny_vision import FAMILIES, png
from tests.scripted_chat import save_scripted_model

HOSTILE = """**Harmless** words first.

<script>window.ran = 1</script><img src=x onerror="window.ran = 2"><iframe src="https://evil.example/frame"></iframe>

[scripted](javascript:window.ran=3) [data](data:text/html,<b>4</b>) [fine](https://ok.example/page) \
![a pixel](https://track.example/p.png "t") <b onclick="window.ran=5" style="color:red">bold?</b>

<style>body{display:none}</style>

| left | right |
|:-----|------:|
| cell | 12345 |
"""
TIDY = """<think>
Something *simple* will do.
</think>

# A heading

1. first `code`
2. second **strong**

```python
print("<b>no markup</b>", "and a line that is far wider than a phone is, in one piece", sep="")
```
"""
SCRIPTS = {"Attack me": HOSTILE, "Think": TIDY}
CATALOGUE = """
project = "Playground"
[[models]]
name = "scripted"
tasks = ["chat"]
weights = "{scripted}"
workers = [[]]
[models.engine]
torch_threads = 1
[[models]]
name = "eyes"
tasks = ["chat"]
weights = "{eyes}"
workers = [[]]
[models.engine]
torch_threads = 1
[models.defaults]
max_tokens = 8
"""


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Real chat engines: a model that answers as SCRIPTS says, and a tiny random one that sees."""
    folder: Path = tmp_path_factory.mktemp("playground-chat")
    weights = save_scripted_model(folder / "weights", templates.QWEN3, SCRIPTS)
    eyes = FAMILIES["qwen2_5_vl"].save(folder / "eyes")
    catalogue = CATALOGUE.format(scripted=weights, eyes=eyes)
    with Deployment(folder / "service", catalogue=catalogue) as service:
        yield service.start("scripted", "eyes")


def open_chat(page: Page) -> None:
    page.get_by_role("link", name="Playground").click()
    expect(page.get_by_role("tab", name="Chat")).to_have_attribute("aria-selected", "true")


def parameter(page: Page, label: str) -> Locator:
    """A field of the parameters, which are folded away on a phone."""
    expect(page.get_by_text("Parameters")).to_be_visible()
    field = page.get_by_label(label, exact=True).or_(page.get_by_role("combobox", name=label))
    fold = page.locator("details.aside:not([open]) > summary")
    if not field.is_visible():
        fold.click()
    return field


def say(page: Page, text: str) -> Locator:
    """Send a message; return its answer."""
    answers = page.locator(".message.answer")
    number = answers.count()
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()
    expect(answers).to_have_count(number + 1)
    return answers.last


def test_a_streamed_answer_with_markdown_and_reasoning(
    browser: Browser, scripted: Deployment, screen: Screen
) -> None:
    with open_page(browser, scripted.url, screen) as (page, watch):
        open_chat(page)
        answer = say(page, "Think")
        expect(answer.get_by_role("heading", name="A heading")).to_be_visible()
        expect(answer.locator("ol > li")).to_have_text(["first code", "second strong"])
        expect(answer.locator("pre code")).to_contain_text('print("<b>no markup</b>"')
        expect(answer).to_have_attribute("aria-busy", "false")
        for figure in ("first token", "total", "tokens/s", " tokens"):
            expect(answer.locator(".figures")).to_contain_text(figure)
        reasoning = answer.get_by_text("Something simple will do.")
        expect(reasoning).to_be_hidden()
        answer.get_by_text("Reasoning").click()
        expect(reasoning).to_be_visible()
        expect(page.get_by_role("status")).to_contain_text("Answer: # A heading")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"

        page.get_by_role("link", name="Console").click()
        expect(page.get_by_role("heading", name="Workers")).to_be_visible()
        page.get_by_role("link", name="Playground").click()
        expect(page.get_by_role("heading", name="A heading")).to_be_visible()
        stored = page.evaluate("JSON.stringify([sessionStorage, localStorage]) + document.cookie")
        assert "Think" not in stored and "heading" not in stored
        assert watch.refused == []


def test_a_hostile_answer_runs_nothing_and_loads_nothing(
    browser: Browser, scripted: Deployment, screen: Screen
) -> None:
    with open_page(browser, scripted.url, screen) as (page, watch):
        open_chat(page)
        answer = say(page, "Attack me")
        expect(answer.locator("strong")).to_have_text("Harmless")
        expect(answer).to_contain_text("<script>window.ran = 1</script>")
        expect(answer.locator("td.right")).to_have_text("12345")
        assert answer.locator("script, img, iframe, style, b, [style], [onclick], [onerror]").count() == 0
        links = answer.locator("a")
        expect(links).to_have_text(["https://evil.example/frame", "fine", "a pixel"])
        for link in links.all():
            assert re.match("https://(ok|track|evil)", link.get_attribute("href") or "")
            assert link.get_attribute("target") == "_blank"
            assert "noopener" in (link.get_attribute("rel") or "")
        assert page.evaluate("window.ran") is None
        assert watch.refused == []


def test_html_is_cleaned_even_if_markdown_lets_it_through(browser: Browser, scripted: Deployment) -> None:
    with open_page(browser, scripted.url, DESKTOP) as (page, watch):
        made = page.evaluate(
            """async (hostile) => {
                const { clean } = await import("/static/js/playground-markdown.js");
                const element = document.createElement("div");
                document.body.append(element);
                element.append(clean(hostile));
                return element.innerHTML;
            }""",
            '<img src="https://evil.example/x" onerror="window.ran=1"><svg onload="window.ran=2"></svg>'
            '<a href="javascript:window.ran=3" id="app" style="color:red" onclick="window.ran=4">link</a>'
            '<form action="https://evil.example"><input name="key"></form><math><mtext><style><img src=x>',
        )
        assert made == '<a target="_blank" rel="noopener noreferrer nofollow">link</a>'
        assert page.evaluate("window.ran") is None and watch.refused == []
        # the parser that DOMPurify cleans for is under the policy, too; Markdown itself gives it nothing to
        # refuse
        assert all("Security Policy" in text or text.startswith("CSP: ") for text in watch.errors)
        watch.errors.clear()


def test_stop_ends_the_answer_and_the_work(browser: Browser, service: Deployment, screen: Screen) -> None:
    with open_page(browser, service.url, screen) as (page, watch):
        open_chat(page)
        parameter(page, "Max tokens").fill("100000")
        answer = say(page, "Count")
        expect(answer.locator(".markdown")).to_contain_text("0 1 2 3")
        page.get_by_role("button", name="Stop").click()
        expect(answer.locator(".figures")).to_contain_text("stopped")
        wait_until(
            lambda: {"model": "echo", "waiting": 0, "running": 0} in service.get("/v1/activity")[1]["queues"],
            timeout_s=20,
            what="the worker has stopped",
        )
        with page.expect_request("**/v1/chat/completions") as asked:
            page.get_by_role("button", name="Try again").click()
        body: Any = asked.value.post_data_json
        assert body["messages"] == [{"role": "user", "content": "Count"}], "the stopped answer is replaced"
        expect(page.locator(".message.answer")).to_have_count(1)
        page.get_by_role("button", name="New chat").click()
        expect(page.locator(".message")).to_have_count(0)
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        assert watch.refused == []


def test_parameters_are_sent_and_refusals_are_told(browser: Browser, service: Deployment) -> None:
    with open_page(browser, service.url, PHONE) as (page, watch):
        open_chat(page)
        parameter(page, "Temperature").fill("0,5")
        for label, value in {"Top p": "0.9", "Max tokens": "3", "Seed": "7"}.items():
            parameter(page, label).fill(value)
        parameter(page, "System prompt").fill("Be brief.")
        with page.expect_request("**/v1/chat/completions") as asked:
            answer = say(page, "Hi")
        assert asked.value.post_data_json == {
            "model": "echo",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "stream": True,
            "temperature": 0.5,
            "top_p": 0.9,
            "max_tokens": 3,
            "seed": 7,
        }
        expect(answer.locator(".markdown")).to_have_text("0 1 2")
        expect(answer.locator(".figures")).to_contain_text("cut off at the limit of tokens")

        parameter(page, "Temperature").fill("hot")
        page.get_by_label("Message", exact=True).fill("Hi")
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("alert")).to_contain_text("Temperature must be a number")
        parameter(page, "Temperature").fill("3")
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("alert")).to_have_text("Temperature must be at most 2 (it is 3).")
        assert len(watch.refused) == 1 and "400" in watch.refused[0]

        # what failed before its first word is no part of the conversation
        parameter(page, "Temperature").fill("")
        with page.expect_request("**/v1/chat/completions") as asked:
            say(page, "Bye")
        body: Any = asked.value.post_data_json
        contents = [message["content"] for message in body["messages"]]
        assert contents == ["Be brief.", "Hi", "0 1 2 ", "Bye"]


def test_images_are_attached_for_a_model_that_sees(
    browser: Browser, scripted: Deployment, screen: Screen, tmp_path: Path
) -> None:
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for seed, path in enumerate(paths):
        path.write_bytes(png(seed=seed))
    with open_page(browser, scripted.url, screen) as (page, watch):
        open_chat(page)
        model = parameter(page, "Model")
        expect(page.get_by_label("Attach images")).to_have_count(0)
        model.select_option("eyes")
        page.get_by_label("Attach images").set_input_files(paths)
        page.get_by_role("button", name="Remove image 1").click()
        expect(page.get_by_role("img", name="of the next message")).to_have_count(1)
        with page.expect_request("**/v1/chat/completions") as asked:
            answer = say(page, "What is it?")
        body: Any = asked.value.post_data_json
        image, text = body["messages"][0]["content"]
        assert text == {"type": "text", "text": "What is it?"}
        sent = image["image_url"]["url"].removeprefix("data:image/png;base64,")
        assert base64.b64decode(sent) == paths[1].read_bytes()
        # at most 8: a random model may end its answer by chance
        expect(answer.locator(".figures")).to_contain_text(re.compile(r"ms[1-8] token"))
        expect(page.get_by_role("img", name="Attached image")).to_be_visible()
        expect(page.get_by_role("img", name="of the next message")).to_have_count(0)
        assert watch.refused == []

        # the conversation has an image, which the other model refuses in words
        parameter(page, "Model").select_option("scripted")
        refused = say(page, "Think")
        expect(refused.get_by_role("alert")).to_contain_text("image")
        assert len(watch.refused) == 1 and "400" in watch.refused[0]


CHUNK = (
    'data: {"id": "c", "choices": [{"index": 0, "delta": {"content": "Half"}, "finish_reason": null}]}\n\n'
)
ERROR = 'data: {"code": 503, "message": "the worker was lost", "error": {"code": "worker_lost"}}\n\n'


@pytest.mark.parametrize(
    ("rest", "said"),
    [("", "before the service said that the answer was complete"), (ERROR, "The worker was lost.")],
)
def test_an_answer_that_breaks_off_is_told_as_incomplete(
    browser: Browser, service: Deployment, rest: str, said: str
) -> None:
    with open_page(browser, service.url, DESKTOP) as (page, watch):
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(body=CHUNK + rest, content_type="text/event-stream"),
        )
        open_chat(page)
        answer = say(page, "Hi")
        expect(answer.get_by_role("alert")).to_contain_text(said)
        expect(answer.get_by_role("alert")).to_contain_text("incomplete")
        expect(answer.locator(".markdown")).to_have_text("Half")
        assert watch.refused == []


def test_the_key_of_the_tab_is_sent(browser: Browser, keyed: Deployment) -> None:
    with open_page(browser, f"{keyed.url}/#/playground", DESKTOP) as (page, watch):
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Use this key").click()
        parameter(page, "Max tokens").fill("2")
        expect(say(page, "Hi").locator(".markdown")).to_have_text("0 1")
        assert all("401" in text for text in watch.refused)


def test_with_the_key_the_page_forgets_what_it_holds(browser: Browser, keyed: Deployment) -> None:
    def enter() -> None:
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Use this key").click()
        expect(page.get_by_role("tab", name="Chat")).to_be_visible()

    def images_prompt() -> Locator:
        page.get_by_role("tab", name="Images").click()
        return page.get_by_label("Prompt", exact=True)

    with open_page(browser, f"{keyed.url}/#/playground", DESKTOP) as (page, watch):
        enter()
        images_prompt().fill("a secret image")
        page.get_by_role("tab", name="Chat").click()
        parameter(page, "System prompt").fill("a secret prompt")
        say(page, "a secret question")
        page.get_by_label("Message", exact=True).fill("a secret draft")
        page.get_by_role("button", name="Forget key").click()
        expect(page.get_by_label("API key")).to_be_focused()
        enter()
        expect(page.get_by_label("Message", exact=True)).to_have_value("")
        expect(page.locator(".message")).to_have_count(0)
        expect(parameter(page, "System prompt")).to_have_value("")
        expect(images_prompt()).to_have_value("")
        assert "secret" not in page.content()
        assert all("401" in text for text in watch.refused)
