"""Takes the screenshots in docs/images/ again: `scripts/screenshots [FOLDER]`.

The service is real and has some load. Beside it stand records of workers with GPUs that do not exist, and
samples of minutes that did not happen, so that the page looks as on a machine that has been busy for a while.
"""

import io
import random
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect

from app.dispatch.activity import KEPT_S, SAMPLE_S, upper_bound_ms
from protocol.leases import GpuUsage, Leases
from protocol.names import Keys
from tests.console.browser import DESKTOP, PHONE, Screen, chromium, open_page
from tests.console.playground_screenshots import take_playground
from tests.deployment import ROOT, Deployment
from tests.records import worker_record
from tests.stand_in_node import StandInNode

CHAT, IMAGES = "Llama3-8B", "SDXL"
PROJECT = "Gallery"
CATALOGUE = f"""
project = "{PROJECT}"
[[models]]
name = "{CHAT}"
tasks = ["chat"]
weights = "echo:step_ms=25&tokens=100000"
[models.engine]
max_batch_size = 8
[[models]]
name = "{IMAGES}"
tasks = ["generation", "edit"]
weights = "echo:"
"""
GIB = 2**30
ENDED = 24
"""Requests that end before the screenshots are taken."""


def main(folder: Path) -> None:
    """Write the images to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, StandInNode() as node, chromium() as browser:
        catalogue = Path(place)
        with Deployment(
            catalogue, catalogue=CATALOGUE, NODE_URL=node.url, PUBLIC_URL="https://models.example.org"
        ) as service:
            service.start(CHAT, IMAGES)
            add_samples(service)
            stop = threading.Event()
            tasks: list[Callable[[], None]] = [
                lambda: draw(service, stop),
                lambda: keep_stand_ins(service, stop),
            ]
            tasks += [lambda seed=seed: chat(service, stop, seed) for seed in range(9)]  # type: ignore[misc]
            load = [threading.Thread(target=task) for task in tasks]
            for thread in load:
                thread.start()
            try:
                take(browser, service, folder)
            finally:
                stop.set()
                for thread in load:
                    thread.join()
        take_playground(
            browser, catalogue / "playground", lambda png, name: save(png, folder / f"{name}.png")
        )


def take(browser: Browser, service: Deployment, folder: Path) -> None:
    views: list[tuple[str, Screen, str, int]] = [
        ("console-light", DESKTOP, "light", 1300),
        ("console-dark", DESKTOP, "dark", 1300),
        ("console-phone", PHONE, "light", 1700),
    ]
    for name, screen, scheme, height in views:
        with open_page(browser, service.url, screen, color_scheme=scheme) as (page, _):
            settle(page)
            clip = {"x": 0, "y": 0, "width": screen.width, "height": height}
            save(page.screenshot(full_page=True, clip=clip), folder / f"{name}.png")  # type: ignore[arg-type]


def settle(page: Page) -> None:
    expect(page.get_by_role("row").filter(has_text="busy").first).to_be_visible()
    expect(page.get_by_role("row").filter(has_text="-2@gpu-2").first).to_be_visible()
    page.wait_for_function(f"() => document.querySelectorAll('.requests tbody tr').length >= {ENDED // 2}")
    page.get_by_role("button", name="Show all").wait_for()


def save(png: bytes, path: Path) -> None:
    """Write with a palette: a third of the bytes."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def chat(service: Deployment, stop: threading.Event, seed: int) -> None:
    chance = random.Random(seed)
    while not stop.wait(chance.expovariate(1)):
        with closing(service.stream("Hi", CHAT, max_tokens=chance.randint(20, 250))) as stream:
            leaves_after = chance.choice([30, 10**6, 10**6, 10**6, 10**6, 10**6])
            for number, _ in enumerate(stream.events()):
                if stop.is_set() or number > leaves_after:
                    break


def draw(service: Deployment, stop: threading.Event) -> None:
    while not stop.wait(4):
        service.post("/v1/images/generations", {"model": IMAGES, "prompt": "a red circle", "n": 2})


def keep_stand_ins(service: Deployment, stop: threading.Event) -> None:
    """Keep the leases of workers that do not exist."""
    leases = Leases(service.redis.client, Keys.of(PROJECT))
    rejected = "the node answered: the service registered by the worker is not accessible"
    rows = [
        {"model": CHAT, "running": 27, "slots": 64, "kv_cache_usage": 0.41, "registered": True},
        {"model": CHAT, "state": "draining", "running": 3, "slots": 64, "kv_cache_usage": 0.04},
        {"model": IMAGES, "running": 0, "slots": 1, "last_error": rejected},
    ]
    usages = [(70.4, 0.93, 71), (71.9, 0.88, 68), (38.2, 0.0, 41)]
    service.redis.client.sadd(Keys.of(PROJECT).drains, f"{CHAT}-2@gpu-2")
    while not stop.is_set():
        for number, (row, (used, busy, heat)) in enumerate(zip(rows, usages, strict=True)):
            gpu = GpuUsage(
                memory_used_bytes=int(used * GIB),
                memory_total_bytes=80 * GIB,
                utilization=busy,
                temperature_c=heat,
            )
            fields = {"state": "ready", "name": f"{row['model']}-{number + 1}@gpu-2", "pid": 4100 + number}
            record = worker_record(f"gpu-2:{number}", **(fields | row), gpus=[str(number)], gpu=gpu)
            leases.renew_worker(record)
        stop.wait(3)


def add_samples(service: Deployment) -> None:
    """Write samples of the past minutes: a load that goes up and down, with a queue at its height."""
    keys, chance = Keys.of(PROJECT), random.Random(1)
    now = int(service.redis.client.time()[0])
    running = 20.0
    for at in range(now - now % SAMPLE_S - KEPT_S, now, SAMPLE_S):
        busy = 1.6 if now - 560 < at < now - 380 else 0.5
        running += chance.gauss(0, 3) + (busy * 26 - running) * 0.12
        claimed = max(0, min(36, round(running)))
        waiting = max(0, round(running - 34 + chance.gauss(0, 1)))
        fields = {f"running {CHAT}": claimed, f"waiting {CHAT}": waiting}
        fields |= {f"running {IMAGES}": chance.randint(0, 1), f"waiting {IMAGES}": 0}
        for _ in range(12):
            ms = chance.lognormvariate(4.4, 0.35) + waiting * chance.uniform(40, 160)
            field = f"{upper_bound_ms(ms)} {CHAT}"
            fields[field] = fields.get(field, 0) + 1
        service.redis.client.hset(keys.sample(at), mapping=fields)
        service.redis.client.expire(keys.sample(at), KEPT_S)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/images")
