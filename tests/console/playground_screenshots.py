"""The screenshots of the playground, for tests.console.screenshots."""

from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, Page, expect

from tests.console.browser import DESKTOP, open_page
from tests.deployment import ROOT, Deployment
from tests.engines import chat_templates as templates
from tests.scripted_chat import save_scripted_model

QUESTION = "How do I edit a part of an image?"
ANSWER = """<think>
The API has an endpoint for edits. The mask decides what may change.
</think>

Send the image and a **mask** of the same size to `/v1/images/edits`:

1. Make the part that may change *transparent*, and leave all else opaque.
2. Describe in `prompt` what the part should show.

```python
edited = client.images.edit(
    model="demo-shapes", prompt="a blue square",
    image=open("image.png", "rb"), mask=open("mask.png", "rb"),
)
```

| field | if it is left out |
|:------|:------------------|
| `mask` | all of the image may change |
| `strength` | the model's own |
| `seed` | a new one for each request |

The pixels outside of the mask stay as they are.
"""
CATALOGUE = """
project = "Playground"
[[models]]
name = "demo-chat"
tasks = ["chat"]
weights = "{weights}"
workers = [[]]
[[models]]
name = "demo-shapes"
tasks = ["generation", "edit"]
weights = "{root}/demo/models/shapes"
workers = [[]]
"""


def take_playground(browser: Browser, place: Path, save: Callable[[bytes, str], None]) -> None:
    """Take the screenshots with real engines and pass each to `save` with its name. `place`: a new folder."""
    weights = save_scripted_model(place / "weights", templates.QWEN3, {QUESTION: ANSWER})
    with Deployment(place / "service", catalogue=CATALOGUE.format(weights=weights, root=ROOT)) as service:
        service.start("demo-chat", "demo-shapes")
        with open_page(browser, f"{service.url}/#/playground", DESKTOP) as (page, _):
            chat(page)
            save(page.screenshot(), "playground-chat")
        with open_page(browser, f"{service.url}/#/playground", DESKTOP, color_scheme="dark") as (page, _):
            draw(page)
            save(page.screenshot(), "playground-images")


def chat(page: Page) -> None:
    page.get_by_label("Message", exact=True).fill(QUESTION)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".figures")).to_contain_text("tokens/s")


def draw(page: Page) -> None:
    page.get_by_role("tab", name="Images").click()
    for label, value in {"Number": "2", "Steps": "30", "Seed": "7"}.items():
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_label("Prompt", exact=True).fill("a red circle")
    page.get_by_role("button", name="Make", exact=True).click()
    page.get_by_role("button", name="Edit", exact=True).first.click()
    page.get_by_label("What the edit should show").fill("a blue square")
    box = page.locator(".mask canvas").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.35, box["y"] + box["height"] * 0.35)
    page.mouse.down()
    for x, y in ((0.65, 0.35), (0.65, 0.5), (0.35, 0.5), (0.35, 0.65), (0.65, 0.65)):
        page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * y, steps=8)
    page.mouse.up()
    expect(page.get_by_text("Only what is painted may change.")).to_be_visible()
    page.evaluate("scrollTo(0, 0)")
