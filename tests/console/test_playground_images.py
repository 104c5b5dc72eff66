"""Images in the playground, by real clicks: made, downloaded, made again, edited with a mask that is
drawn."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from tests.console.browser import DESKTOP, PHONE, Screen, open_page
from tests.deployment import ROOT, Deployment, wait_until

MODEL = "demo-shapes"
CATALOGUE = f"""
project = "Playground"
[[models]]
name = "{MODEL}"
tasks = ["generation", "edit"]
weights = "{ROOT}/demo/models/shapes"
workers = [[]]
[models.engine]
torch_threads = 1
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The demo's image model."""
    folder: Path = tmp_path_factory.mktemp("playground-images")
    with Deployment(folder, catalogue=CATALOGUE) as service:
        yield service.start(MODEL)


def open_images(page: Page) -> None:
    page.get_by_role("link", name="Playground").click()
    page.get_by_role("tab", name="Images").click()


def parameter(page: Page, label: str) -> Locator:
    """A field of the parameters, which are folded away on a phone."""
    expect(page.get_by_text("Parameters")).to_be_visible()
    field = page.get_by_label(label, exact=True)
    if not field.is_visible():
        page.locator("details.aside > summary").click()
    return field


def make(page: Page, number: int, button: str = "Make") -> Locator:
    """Click and wait until the page shows `number` images in all; return the newest batch."""
    page.get_by_role("button", name=button, exact=True).first.click()
    expect(page.locator("figure img")).to_have_count(number)
    batch = page.get_by_role("article").first
    expect(batch).to_have_attribute("aria-busy", "false")
    return batch


def download(page: Page, batch: Locator) -> tuple[str, bytes]:
    """Download the first image of a batch: the name of the file, and the file."""
    with page.expect_download() as started:
        batch.get_by_role("link", name="Download").first.click()
    return started.value.suggested_filename, started.value.path().read_bytes()


def pixels(png: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def drag(
    page: Page, canvas: Locator, screen: Screen, begin: tuple[float, float], end: tuple[float, float]
) -> None:
    """Draw a line over the canvas with the mouse or a finger. Places are parts of its width and height."""
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    line = [
        (box["x"] + box["width"] * x, box["y"] + box["height"] * y)
        for x, y in zip(np.linspace(begin[0], end[0], 9), np.linspace(begin[1], end[1], 9), strict=True)
    ]
    if not screen.touch:
        page.mouse.move(*line[0])
        page.mouse.down()
        for point in line[1:]:
            page.mouse.move(*point)
        page.mouse.up()
        return
    finger = page.context.new_cdp_session(page)
    for kind, points in [
        ("touchStart", line[:1]),
        *(("touchMove", [point]) for point in line[1:]),
        ("touchEnd", []),
    ]:
        touches = [{"x": float(x), "y": float(y)} for x, y in points]
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})


def distances(side: int, begin: tuple[float, float], end: tuple[float, float]) -> Any:
    """The distance of each pixel of a square image from a line, whose places are parts of its width and
    height."""
    points = np.stack(np.meshgrid(np.arange(side) + 0.5, np.arange(side) + 0.5), axis=-1)
    first, line = np.array(begin) * side, (np.array(end) - np.array(begin)) * side
    along = np.clip((points - first) @ line / (line @ line), 0, 1)
    return np.linalg.norm(points - first - along[..., None] * line, axis=-1)


def test_an_image_is_made_downloaded_and_edited_where_the_mask_is_drawn(
    browser: Browser, shapes: Deployment, screen: Screen
) -> None:
    with open_page(browser, shapes.url, screen) as (page, watch):
        open_images(page)
        parameter(page, "Steps").fill("6")
        parameter(page, "Seed").fill("5")
        page.get_by_label("Prompt", exact=True).fill("a red circle")
        first = make(page, 1)
        expect(first).to_contain_text("64 × 64")
        name, png = download(page, first)
        assert name == f"{MODEL}-5.png"
        before = pixels(png)
        assert before.shape == (64, 64, 3)

        first.get_by_role("button", name="Edit").click()
        # also downwards: without `touch-action: none` a finger would scroll the page instead
        begin, end = (0.2, 0.2), (0.8, 0.5)
        drag(page, page.locator(".mask canvas"), screen, begin, end)
        expect(page.get_by_text("Only what is painted may change.")).to_be_visible()
        page.get_by_label("What the edit should show").fill("a blue square")
        edited = make(page, 2, "Edit")
        _, png = download(page, edited)
        changed = np.abs(pixels(png) - before).sum(2) > 0
        distance = distances(64, begin, end)
        # the brush is 12 % wide, which is 3.8 pixels to either side
        assert changed[distance < 3].mean() > 0.9, "what is painted changes"
        assert not changed[distance > 5].any(), "the rest does not"

        _, again = download(page, make(page, 3, "Make again"))
        assert again == png, "the same seed, image and mask make the same edit"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
        assert watch.refused == []


def test_previews_are_shown_until_the_image_is_there(
    browser: Browser, shapes: Deployment, screen: Screen
) -> None:
    with open_page(browser, shapes.url, screen) as (page, watch):
        open_images(page)
        for label, value in {"Steps": "32", "Width": "256", "Height": "256", "Seed": "3"}.items():
            parameter(page, label).fill(value)
        page.get_by_label("Prompt", exact=True).fill("a red circle")
        page.get_by_role("button", name="Make", exact=True).click()
        batch = page.get_by_role("article").first
        expect(batch.get_by_text(re.compile(r"step \d+ of 32"))).to_be_visible()
        preview = batch.get_by_role("img", name="Preview of: a red circle")
        expect(preview).to_be_visible()
        expect(preview).to_have_js_property("naturalWidth", 256)
        first = preview.get_attribute("src")
        assert first is not None
        expect(batch.get_by_role("progressbar")).to_have_attribute("max", "32")
        box = preview.bounding_box()
        expect(preview).not_to_have_attribute("src", first)

        expect(batch).to_have_attribute("aria-busy", "false", timeout=60_000)
        expect(batch.locator("figure.preview")).to_have_count(0)
        image = batch.get_by_role("img", name="a red circle", exact=True)
        shown = image.bounding_box()
        assert box is not None and shown is not None
        assert (shown["width"], shown["height"]) == (box["width"], box["height"]), "nothing jumps"
        _, png = download(page, batch)
        fields = {"width": 256, "height": 256, "steps": 32, "seed": 3, "response_format": "b64_json"}
        body = {"model": MODEL, "prompt": "a red circle", **fields}
        _, plain = shapes.post("/v1/images/generations", body)
        assert png == base64.b64decode(plain["data"][0]["b64_json"])
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
        assert watch.refused == []


STEP, PREVIEW = (
    ": step 1 of 4\n\n",
    "event: image_generation.partial_image\n"
    'data: {"type": "image_generation.partial_image", "b64_json": "AA==", "image_index": 0,'
    ' "output_format": "jpeg"}\n\n',
)
LOST = '{"code": 503, "message": "the worker was lost", "error": {"code": "worker_lost"}}'


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (STEP + PREVIEW + f"event: error\ndata: {LOST}\n\n", "The worker was lost."),
        (STEP + PREVIEW, "The stream ended before all images had come."),
        (STEP + PREVIEW + PREVIEW[:40], "The stream ended before all images had come."),
    ],
    ids=["error", "missing image", "cut off"],
)
def test_a_stream_that_breaks_off_shows_no_image(
    browser: Browser, service: Deployment, stream: str, text: str
) -> None:
    with open_page(browser, service.url, DESKTOP) as (page, _):
        page.route(
            "**/v1/images/generations",
            lambda route: route.fulfill(body=stream, content_type="text/event-stream"),
        )
        open_images(page)
        page.get_by_label("Prompt", exact=True).fill("two circles")
        page.get_by_role("button", name="Make", exact=True).click()
        expect(page.get_by_role("alert")).to_have_text(text)
        expect(page.locator("figure")).to_have_count(0)
        expect(page.get_by_role("button", name="Make", exact=True)).to_be_visible()


def test_cancel_ends_the_work(browser: Browser, shapes: Deployment) -> None:
    with open_page(browser, shapes.url, PHONE) as (page, watch):
        open_images(page)
        for label, value in {"Steps": "50", "Width": "384", "Height": "384"}.items():
            parameter(page, label).fill(value)
        page.get_by_label("Prompt", exact=True).fill("a green triangle")
        page.get_by_role("button", name="Make", exact=True).click()
        # a dozen steps, of some seconds each on a busy processor
        expect(page.locator("figure.preview img")).to_be_visible(timeout=180_000)
        assert shapes.worker_rows()[0]["running"] == 1
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("article")).to_have_count(0)
        expect(page.get_by_role("button", name="Make", exact=True)).to_be_visible()
        wait_until(
            lambda: shapes.worker_rows()[0]["running"] == 0, timeout_s=30, what="the worker has stopped"
        )
        assert watch.refused == []


def test_parameters_are_sent_and_refusals_are_told(
    browser: Browser, service: Deployment, screen: Screen
) -> None:
    with open_page(browser, service.url, screen) as (page, watch):
        open_images(page)
        values = {"Width": "64", "Height": "128", "Number": "2", "Steps": "4", "Guidance": "2.5", "Seed": "9"}
        for label, value in values.items():
            parameter(page, label).fill(value)
        parameter(page, "Negative prompt").fill("text")
        page.get_by_label("Prompt", exact=True).fill("two circles")
        with page.expect_request("**/v1/images/generations") as asked:
            batch = make(page, 2)
        assert asked.value.post_data_json == {
            "model": "echo-images",
            "prompt": "two circles",
            "negative_prompt": "text",
            "width": 64,
            "height": 128,
            "n": 2,
            "steps": 4,
            "guidance_scale": 2.5,
            "seed": 9,
            "stream": True,
            "partial_images": 3,
        }
        expect(batch).to_contain_text("64 × 128")
        expect(page.get_by_role("status")).to_have_text("2 images made of: two circles")

        page.get_by_role("tab", name="Images").press("ArrowLeft")
        expect(page.get_by_label("Message", exact=True)).to_be_visible()
        page.get_by_role("tab", name="Chat").press("ArrowRight")
        expect(page.locator("figure img")).to_have_count(2)

        parameter(page, "Width").fill("7")
        page.get_by_role("button", name="Make", exact=True).click()
        expect(page.get_by_role("alert")).to_contain_text("Width: the width must be a multiple of 8")
        assert len(watch.refused) == 1 and "400" in watch.refused[0]


def test_an_image_from_disk_and_a_mask_by_keyboard(
    browser: Browser, service: Deployment, tmp_path: Path
) -> None:
    Image.new("RGB", (200, 100), "navy").save(tmp_path / "disk.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with open_page(browser, service.url, DESKTOP) as (page, watch):
        open_images(page)
        page.get_by_label("Edit an image from disk").set_input_files(tmp_path / "broken.png")
        expect(page.get_by_role("alert")).to_contain_text("can't read the file")
        page.get_by_label("Edit an image from disk").set_input_files(tmp_path / "disk.png")
        mask = page.get_by_role("application")
        mask.focus()
        for key in ("Space", "ArrowLeft", "ArrowUp", "Space"):
            mask.press(key)
        page.get_by_label("What the edit should show").fill("a circle")
        page.get_by_role("button", name="Undo").click()
        make(page, 1, "Edit")
        marked = page.evaluate(
            """async () => {
                const { images } = await import("/static/js/playground-images.js");
                const { maskFile } = await import("/static/js/playground-mask.js");
                const { source, strokes } = images.state.batches[0];
                const picture = await createImageBitmap(await maskFile(source, strokes));
                const context = new OffscreenCanvas(picture.width, picture.height)
                    .getContext("2d", { willReadFrequently: true });
                context.drawImage(picture, 0, 0);
                const alpha = (x, y) => context.getImageData(x, y, 1, 1).data[3];
                return [picture.width, picture.height, alpha(100, 50), alpha(10, 10), strokes.length];
            }"""
        )
        assert marked == [200, 100, 0, 255, 1], "transparent where the image may change"
        page.get_by_role("button", name="Don't edit").click()
        expect(page.get_by_role("button", name="Make", exact=True)).to_be_visible()
        assert watch.refused == []
