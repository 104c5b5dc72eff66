"""Decoding of uploaded files, refusal of damaged ones, and encoding of results."""

import functools
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from protocol.errors import InvalidImage
from workers.engines.images.pixels import Source, decode_source, encode_png, fit, paste_back


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def two_halves(left: str = "red", right: str = "blue", size: tuple[int, int] = (8, 4)) -> Image.Image:
    image = Image.new("RGB", size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def marked(source: Source) -> list[list[int]]:
    assert source.mask is not None
    values = np.asarray(source.mask)
    assert set(np.unique(values)) <= {0, 255}
    return (values // 255).tolist()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_accepted_format_is_decoded(kind):
    options = (
        {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    )
    decoded = decode_source(file(two_halves(size=(32, 16)), kind, **options), None)
    assert decoded.image.mode == "RGB" and decoded.image.size == (32, 16) and decoded.mask is None
    assert np.abs(np.asarray(decoded.image).astype(int) - np.asarray(two_halves(size=(32, 16)))).max() < 8


@pytest.mark.parametrize(
    ("orientation", "size", "corner"),
    [(1, (8, 4), "red"), (3, (8, 4), "blue"), (6, (4, 8), "red"), (8, (4, 8), "blue"), (2, (8, 4), "blue")],
)
def test_the_exif_orientation_is_applied(orientation, size, corner):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "WEBP"):
        decoded = decode_source(
            file(two_halves(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})), None
        )
        assert decoded.image.size == size
        assert decoded.image.getpixel((0, 0)) == {"red": (255, 0, 0), "blue": (0, 0, 255)}[corner]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_is_converted_to_rgb(mode):
    image = Image.new("RGB", (8, 4), "white").convert(mode)
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    decoded = decode_source(file(image, kind), None)
    assert decoded.image.mode == "RGB" and np.asarray(decoded.image).min() > 250


def test_sixteen_bit_grey_is_scaled_to_eight_bits():
    grey = Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16))
    decoded = decode_source(file(grey), None)
    assert np.asarray(decoded.image)[0, :, 0].tolist() == [0, 128, 255]


def test_transparent_pixels_of_the_image_are_the_mask():
    image = two_halves().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 2, 4))
    decoded = decode_source(file(image), None)
    assert marked(decoded) == [[1, 1, 0, 0, 0, 0, 0, 0]] * 4 and not decoded.mask_requested
    assert decoded.image.getpixel((0, 0)) == (255, 255, 255)
    assert decode_source(file(two_halves().convert("RGBA")), None).mask is None


def test_a_transparent_palette_colour_is_a_mask():
    image = two_halves().convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    decoded = decode_source(file(image, transparency=image.getpixel((0, 0))), None)
    assert marked(decoded) == [[1, 1, 1, 1, 0, 0, 0, 0]] * 4


def test_white_pixels_of_the_mask_are_edited():
    decoded = decode_source(file(two_halves()), file(two_halves("white", "black").convert("L")))
    assert marked(decoded) == [[1, 1, 1, 1, 0, 0, 0, 0]] * 4 and decoded.mask_requested


def test_transparent_pixels_of_the_mask_take_precedence_over_white_ones():
    mask = two_halves("white", "black").convert("RGBA")
    mask.paste((0, 0, 0, 0), (6, 0, 8, 4))
    assert marked(decode_source(file(two_halves()), file(mask))) == [[0, 0, 0, 0, 0, 0, 1, 1]] * 4
    opaque = two_halves("white", "black").convert("RGBA")
    assert marked(decode_source(file(two_halves()), file(opaque))) == [[1, 1, 1, 1, 0, 0, 0, 0]] * 4


def test_paste_back_keeps_unmarked_pixels_at_any_size():
    source = Source(two_halves(), two_halves("white", "black").convert("L"), True)
    for size in ((8, 4), (16, 8), (4, 2)):
        result = paste_back(Image.new("RGB", size, "lime"), source)
        expected = fit(source, size).image
        half = size[0] // 2
        assert np.asarray(result)[:, :half].tolist() == [[[0, 255, 0]] * half] * size[1]
        assert (np.asarray(result)[:, half:] == np.asarray(expected)[:, half:]).all()
    whole = Image.new("RGB", (8, 4), "lime")
    assert paste_back(whole, source._replace(mask=None)) is whole


def test_results_have_no_metadata():
    image = two_halves()
    image.info["comment"] = "SECRET"
    image.info["exif"] = b"SECRET"
    data = encode_png(image)
    assert b"SECRET" not in data and Image.open(BytesIO(data)).info == {}


SAMPLES = [
    file(two_halves(size=(64, 64))),
    file(two_halves(size=(64, 64)), "JPEG"),
    file(two_halves(size=(64, 64)), "WEBP"),
    file(two_halves(size=(64, 64)).convert("P")),
]


@pytest.mark.parametrize("sample", SAMPLES, ids=["png", "jpeg", "webp", "palette"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.7])
def test_truncated_files_are_refused(sample, share):
    for files in (
        (sample[: int(len(sample) * share)], None),
        (SAMPLES[0], sample[: int(len(sample) * share)]),
    ):
        with pytest.raises(InvalidImage) as caught:
            decode_source(*files)
        assert caught.value.param == ("image" if files[1] is None else "mask")


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=20),
)
def test_damaged_files_are_decoded_or_refused(sample, changes):
    damaged = bytearray(sample)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    try:
        decoded = decode_source(bytes(damaged), None)
    except InvalidImage:
        return
    assert decoded.image.mode == "RGB"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@functools.cache
def bombs() -> dict[str, bytes]:
    """Small files that would take a lot of memory when decompressed."""
    small = file(two_halves())
    head, rest = small[:33], small[33:]
    zeros = zlib.compress(b"\0" * 200_000_000, 9)
    return {
        "pixels": file(Image.new("1", (13_000, 13_000))),
        "text": head + chunk(b"zTXt", b"k\0\0" + zeros) + rest,
        "profile": head + chunk(b"iCCP", b"k\0\0" + zeros) + rest,
        "data": head + chunk(b"IDAT", zeros) + chunk(b"IEND", b""),
        "exif": head + chunk(b"eXIf", b"Exif" * 2_000_000) + rest,
        "long side": small[:16] + struct.pack(">II", 2**31 - 1, 1) + small[24:],
    }


UNDER_A_LIMIT = """
import resource, sys, time
from pathlib import Path
from PIL import Image
from protocol.errors import InvalidImage
from workers.engines.images.pixels import decode_source, encode_png
decode_source(encode_png(Image.new("RGB", (8, 8))), None)
for path in map(Path, sys.argv[1:]):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.monotonic()
    try:
        decode_source(path.read_bytes(), None)
        end = "decoded"
    except InvalidImage:
        end = "refused"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert time.monotonic() - begun < 16 and grown <= 64, (path.stem, time.monotonic() - begun, grown)
    print(path.stem, end)
"""


@pytest.mark.slow
def test_decompression_bombs_are_bounded_in_time_and_memory(tmp_path):
    paths = []
    for name, data in bombs().items():
        paths.append(tmp_path / f"{name}.png")
        paths[-1].write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT, *map(str, paths)], capture_output=True, text=True, timeout=340
    )
    assert done.returncode == 0, done.stderr
    outcomes = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert set(outcomes) == set(bombs())
    assert {name for name, end in outcomes.items() if end == "refused"} >= {"pixels", "text", "long side"}
