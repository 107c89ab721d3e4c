import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from training_framework.data.decoding import (
    Pixels,
    decode_image,
    decode_random_resized_crop,
    random_crop_box,
)
from training_framework.data.jpeg_regions import Box, Region, decode_region
from training_framework.errors import UserError

HEIGHT, WIDTH = 203, 330


def _jpeg(*, mode: str = "RGB", **options: Any) -> bytes:
    """A JPEG of colourful noise at two scales, in which no part looks like another."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    noise = rng.integers(-20, 20, (HEIGHT, WIDTH, 3))
    pixels = (np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "JPEG", quality=90, **options)
    return stream.getvalue()


# Units are 8 pixels across in full chroma and gray, 16 in halved: 42 or 21 of them in a row.
KINDS: dict[str, Callable[[], bytes]] = {
    "full chroma": lambda: _jpeg(subsampling="4:4:4"),
    "chroma halved across": lambda: _jpeg(subsampling="4:2:2"),
    "chroma halved": lambda: _jpeg(subsampling="4:2:0"),
    "gray": lambda: _jpeg(mode="L"),
    "markers within rows": lambda: _jpeg(subsampling="4:2:0", restart_marker_blocks=3),
    "marker after every unit": lambda: _jpeg(subsampling="4:2:0", restart_marker_blocks=1),
    "markers within rows, full chroma": lambda: _jpeg(subsampling=0, restart_marker_blocks=7),
    "markers within rows, gray": lambda: _jpeg(mode="L", restart_marker_blocks=2),
    "markers between rows": lambda: _jpeg(subsampling="4:2:0", restart_marker_rows=1),
    "markers between pairs of rows": lambda: _jpeg(subsampling="4:2:2", restart_marker_rows=2),
    "markers elsewhere": lambda: _jpeg(subsampling="4:2:0", restart_marker_blocks=5),
}
SEGMENTED = [kind for kind in KINDS if kind.startswith("marker") and kind != "markers elsewhere"]


def _boxes(count: int) -> list[Box]:
    rng = np.random.default_rng(1)
    boxes = []
    for _ in range(count):
        height, width = int(rng.integers(16, HEIGHT)), int(rng.integers(16, WIDTH))
        top, left = rng.integers(HEIGHT - height + 1), rng.integers(WIDTH - width + 1)
        boxes.append(Box(int(top), int(left), height, width))
    return [*boxes, Box(0, 0, 16, 16), Box(HEIGHT - 16, WIDTH - 16, 16, 16)]


def _whole(data: bytes, factor: int) -> Pixels:
    pixels: Pixels = simplejpeg.decode_jpeg(
        data, min_height=-(-HEIGHT // factor), min_width=-(-WIDTH // factor)
    )
    return pixels


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_region_equals_that_part_of_the_whole_picture(kind: str, factor: int) -> None:
    data = KINDS[kind]()
    whole = _whole(data, factor)
    assert whole.shape[:2] == (-(-HEIGHT // factor), -(-WIDTH // factor))
    found = 0
    for box in _boxes(20):
        region = decode_region(data, box, factor=factor)
        if region is None:
            continue
        found += 1
        rows = slice(box.top // factor, -(-(box.top + box.height) // factor))
        columns = slice(box.left // factor, -(-(box.left + box.width) // factor))
        part = region.pixels[
            rows.start - region.top : rows.stop - region.top,
            columns.start - region.left : columns.stop - region.left,
        ]
        np.testing.assert_array_equal(part, whole[rows, columns])
    assert found >= (20 if kind in SEGMENTED else 12)


def test_less_is_decoded_than_the_whole() -> None:
    box = Box(100, 100, 60, 60)
    rows_above = decode_region(KINDS["full chroma"](), box, factor=1)
    assert rows_above is not None
    assert rows_above.pixels.shape[:2] == (160, WIDTH)
    segments = decode_region(KINDS["markers within rows"](), box, factor=1)
    assert segments is not None
    assert (segments.top, segments.left) == (96, 96)
    assert segments.pixels.shape[:2] == (80, 96)


def test_damage_outside_of_the_part_is_not_even_read() -> None:
    data = bytearray(KINDS["marker after every unit"]())
    box = Box(40, 40, 40, 40)
    expected = decode_region(bytes(data), box, factor=1)
    markers = [i for i in range(len(data) - 1) if data[i] == 0xFF and 0xD0 <= data[i + 1] <= 0xD7]
    for position in range(markers[0] - 8, markers[0] - 2):
        data[position] = 0x55
    found = decode_region(bytes(data), box, factor=1)
    assert isinstance(expected, Region) and isinstance(found, Region)
    np.testing.assert_array_equal(found.pixels, expected.pixels)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"no picture",
        _jpeg(progressive=True),
        _jpeg(mode="CMYK"),
        KINDS["full chroma"]()[:150],
        KINDS["full chroma"]()[:-2000],
    ],
    ids=["empty", "no header", "no JPEG", "progressive", "CMYK", "short header", "truncated"],
)
def test_what_cannot_be_decoded_in_part_is_left_to_others(data: bytes) -> None:
    assert decode_region(data, Box(10, 10, 50, 50), factor=1) is None


def test_a_missing_restart_marker_is_noticed() -> None:
    data = KINDS["markers within rows"]()
    marker = data.index(b"\xff\xd3")
    assert decode_region(data, Box(HEIGHT - 20, 0, 20, WIDTH), factor=1) is not None
    without = data[:marker] + data[marker + 2 :]
    assert decode_region(without, Box(HEIGHT - 20, 0, 20, WIDTH), factor=1) is None


def test_truncation_below_the_part_is_an_error_all_the_same() -> None:
    data = KINDS["full chroma"]()
    seed = next(
        seed
        for seed in range(1000)
        if (region := _first_region(data, seed)) and region.pixels.shape[0] < HEIGHT // 2
    )
    with pytest.raises(UserError, match=r"cut\.jpg"):
        decode_random_resized_crop(
            data[: int(0.9 * len(data))], "cut.jpg", size=32, rng=np.random.default_rng(seed)
        )


def _first_region(data: bytes, seed: int) -> Region | None:
    box = random_crop_box(HEIGHT, WIDTH, rng=np.random.default_rng(seed))
    return decode_region(data, box, factor=1)


def test_mutated_headers_are_refused_or_decoded_but_never_more() -> None:
    """Sizes, intervals and samplings that lie may not lead to an exception, nor to a huge array."""
    rng = np.random.default_rng(2)
    for kind in ("full chroma", "markers within rows", "markers between pairs of rows"):
        whole = KINDS[kind]()
        header = whole.index(b"\xff\xda") + 20
        for _ in range(150):
            data = bytearray(whole)
            for position in rng.integers(2, header, 3):
                data[position] = rng.integers(256)
            for position in _sizes(data):
                # Sizes beyond the tests' memory are refused from the header, before any part.
                height, width = struct.unpack_from(">HH", data, position)
                if height * width > 4_000_000:
                    struct.pack_into(">HH", data, position, height % 1000, width % 1000)
            decode_region(bytes(data), Box(50, 60, 100, 90), factor=1)


def _sizes(data: bytearray) -> list[int]:
    """Where the header tells height and width."""
    positions = (data.find(bytes((0xFF, kind))) for kind in (0xC0, 0xC1))
    return [position + 5 for position in positions if position >= 0]


def test_whole_picture_equals_the_general_path() -> None:
    data = KINDS["markers within rows"]()
    region = decode_region(data, Box(0, 0, HEIGHT, WIDTH), factor=1)
    assert region is not None
    np.testing.assert_array_equal(region.pixels, decode_image(data, "x"))
