"""What opening an image file does beside reading it."""

import base64
import io
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
OPEN = """
import base64, sys
from protocol.errors import InvalidImage
from protocol.image_files import open_image
before = set(sys.modules)
for line in sys.stdin.read().split():
    try:
        image = open_image(base64.b64decode(line))
        image.info, image.getexif()
    except InvalidImage:
        print("refused")
    else:
        print(image.format)
print(sorted(set(sys.modules) - before))
"""


def encoded(kind: str, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    target = io.BytesIO()
    Image.new("RGB", (8, 8)).save(target, kind, exif=exif, **options)
    return target.getvalue()


def test_opening_an_image_imports_nothing() -> None:
    """The web process opens images in several threads; their imports can wait for each other without end,
    because gevent's locks are those of its event loop."""
    two = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    photo = encoded("MPO", save_all=True, append_images=two)
    files = [
        encoded("PNG"),
        encoded("JPEG"),
        encoded("WEBP"),
        photo,
        b"no image",
        encoded("PNG")[:40],
        b"GIF89a",
    ]
    done = subprocess.run(
        [sys.executable, "-c", OPEN],
        input=b"\n".join(base64.b64encode(file) for file in files),
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=True,
    )
    *formats, imported = done.stdout.decode().splitlines()
    assert formats == ["PNG", "JPEG", "WEBP", "MPO", "refused", "refused", "refused"]
    assert imported == "[]"
