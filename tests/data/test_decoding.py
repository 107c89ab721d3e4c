import io
import warnings

import numpy as np
import pytest
from PIL import Image

from training_framework.data.decoding import (
    Box,
    Pixels,
    decode_center_crop,
    decode_image,
    decode_random_resized_crop,
    image_shape,
    random_crop_box,
    resize,
    resize_and_center_crop,
)
from training_framework.errors import UserError


def _image(height: int = 60, width: int = 90) -> Pixels:
    """A smooth colourful image, on which resampling methods can be compared."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = (np.sin(rows / 7), np.cos(columns / 9), np.sin((rows + columns) / 11))
    return (127 + 120 * np.stack(waves, axis=2)).astype(np.uint8)


def _detailed_image(height: int, width: int) -> Pixels:
    """Contrast at all scales, as photographs have it: of half the size, half as strong."""
    rng = np.random.default_rng(0)
    image = np.zeros((height, width, 3))
    for divisor in (64, 32, 16, 8, 4, 2, 1):
        coarse = rng.uniform(-divisor, divisor, (height // divisor + 1, width // divisor + 1, 3))
        channels = [
            Image.fromarray(coarse[:, :, channel].astype(np.float32)).resize((width, height))
            for channel in range(3)
        ]
        image += np.stack([np.asarray(channel) for channel in channels], axis=2)
    return (128 + image).clip(0, 255).astype(np.uint8)


def _photograph() -> bytes:
    """A large JPEG without detail that a small image of it could not show."""
    large = Image.fromarray(_image()).resize((900, 600), Image.Resampling.BICUBIC)
    return _encoded(large, "JPEG", quality=95)


def _encoded(image: Image.Image | Pixels, kind: str, **options: object) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _with_pillow(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_their_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = _encoded(_image(), kind, **options)
    assert image_shape(data, "x") == (60, 90)
    np.testing.assert_array_equal(decode_image(data, "x"), _image())


def test_jpeg_equals_pillow() -> None:
    data = _encoded(_image(), "JPEG", quality=90)
    difference = decode_image(data, "x").astype(int) - _with_pillow(data)
    assert np.abs(difference).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
def test_gray_images_have_three_equal_channels(kind: str) -> None:
    gray = Image.fromarray(_image()).convert("L")
    pixels = decode_image(_encoded(gray, kind), "x")
    assert pixels.shape == (60, 90, 3)
    assert (pixels == pixels[:, :, :1]).all()
    assert np.abs(pixels[:, :, 0].astype(int) - np.asarray(gray)).max() <= 8


def test_cmyk_jpeg_is_converted() -> None:
    data = _encoded(Image.fromarray(_image()).convert("CMYK"), "JPEG", quality=95)
    np.testing.assert_array_equal(decode_image(data, "x"), _with_pillow(data))
    assert np.abs(decode_image(data, "x").astype(int) - _image()).mean() < 6


def test_palette_png_with_transparency_keeps_its_colours() -> None:
    palette = Image.fromarray(_image()).quantize(16)
    data = _encoded(palette, "PNG", transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode_image(data, "x")
    np.testing.assert_array_equal(pixels, np.asarray(palette.convert("RGB")))


def test_sixteen_bit_png_is_scaled_not_clipped() -> None:
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    pixels = decode_image(_encoded(Image.fromarray(ramp), "PNG"), "x")
    np.testing.assert_array_equal(pixels[:, :, 1], (ramp >> 8).astype(np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.0, 0.05, 0.6])
def test_truncated_images_are_errors_that_name_the_file(kind: str, kept: float) -> None:
    data = _encoded(_image(200, 300), kind)
    data = data[: int(len(data) * kept)]
    with pytest.raises(UserError, match=r"cat/7\.jpg"):
        decode_image(data, "cat/7.jpg")
    with pytest.raises(UserError, match=r"cat/7\.jpg"):
        decode_center_crop(data, "cat/7.jpg", size=32)


def test_other_files_are_no_images() -> None:
    with pytest.raises(UserError, match=r"notes\.jpg: not an image of a known format"):
        decode_image(b"not a image", "notes.jpg")


def test_formats_beyond_the_known_ones_are_refused() -> None:
    with pytest.raises(UserError, match="not an image of a known format"):
        decode_image(_encoded(_image(), "PPM"), "x.png")


def test_decompression_bombs_are_refused_from_their_header() -> None:
    small = _encoded(_image(8, 8), "BMP")
    # Width and height stand at bytes 18 and 22 of a BMP file.
    side = (14_000).to_bytes(4, "little")
    bomb = small[:18] + side + side + small[26:]
    with pytest.raises(UserError, match=r"bomb\.bmp: .* pixels"):
        decode_image(bomb, "bomb.bmp")


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        ((200, 300), (200, 300)),
        ((100, 150), (100, 150)),
        ((101, 1), (200, 300)),
        ((25, 37), (25, 38)),
    ],
)
def test_jpeg_is_decoded_at_the_smallest_sufficient_scale(
    least: tuple[int, int], expected: tuple[int, int]
) -> None:
    data = _encoded(_image(200, 300), "JPEG")
    assert decode_image(data, "x", min_size=least).shape[:2] == expected


@pytest.mark.parametrize(("height", "width"), [(30, 40), (224, 97), (17, 17)])
def test_resize_equals_pillow(height: int, width: int) -> None:
    image = _image()
    expected = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    assert np.abs(resize(image, height, width).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64), (300, 451)])
def test_center_crop_equals_resizing_and_cropping_with_pillow(shape: tuple[int, int]) -> None:
    image, size = _image(*shape), 56
    height, width = shape
    shorter = 64
    new_height = shorter if height <= width else int(shorter * height / width)
    new_width = shorter if width <= height else int(shorter * width / height)
    resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    expected = np.asarray(resized)[top : top + size, left : left + size].astype(int)
    assert np.abs(resize_and_center_crop(image, size).astype(int) - expected).max() <= 1
    data = _encoded(image, "PNG")
    assert np.abs(decode_center_crop(data, "x", size=size).astype(int) - expected).max() <= 1


def test_center_crop_of_a_large_jpeg_is_close_to_the_one_from_all_its_pixels() -> None:
    data = _photograph()
    scaled = decode_center_crop(data, "x", size=56).astype(int)
    whole = resize_and_center_crop(decode_image(data, "x"), 56)
    assert np.abs(scaled - whole).mean() < 1.5


def test_center_crop_of_a_very_long_image_takes_its_middle() -> None:
    image = np.zeros((2, 4000, 3), dtype=np.uint8)
    image[:, 1990:2010] = 200
    crop = resize_and_center_crop(image, 32)
    assert crop.shape == (32, 32, 3)
    assert (crop == 200).all()


def test_random_crop_equals_cropping_and_resizing_with_pillow() -> None:
    image = _image()
    data = _encoded(image, "PNG")
    for seed in range(20):
        box = random_crop_box(60, 90, rng=np.random.default_rng(seed))
        got = decode_random_resized_crop(data, "x", size=40, rng=np.random.default_rng(seed))
        corners = (box.left, box.top, box.left + box.width, box.top + box.height)
        cropped = Image.fromarray(image).crop(corners)
        expected = np.asarray(cropped.resize((40, 40), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(got - expected).max() <= 1


def test_random_crop_of_a_large_jpeg_is_close_to_the_one_from_all_its_pixels() -> None:
    image = _detailed_image(600, 900)
    data = _encoded(image, "JPEG", quality=95)
    whole = Image.open(io.BytesIO(data))
    factors, errors = set(), []
    for seed in range(30):
        box = random_crop_box(600, 900, rng=np.random.default_rng(seed))
        got = decode_random_resized_crop(data, "x", size=64, rng=np.random.default_rng(seed))
        # At a factor, the crop's edges are the nearest that such a scale can show.
        factor = max(f for f in (1, 2, 4, 8) if min(box.height, box.width) >= 96 * f or f == 1)
        left, top, right, bottom = (
            (edge + factor // 2) // factor * factor
            for edge in (box.left, box.top, box.left + box.width, box.top + box.height)
        )
        exact = whole.crop((left, top, right, bottom)).resize((64, 64), Image.Resampling.BILINEAR)
        errors.append(np.abs(got.astype(int) - np.asarray(exact)).mean())
        factors.add(factor)
    assert factors == {2, 4}
    assert max(errors) < 2


def test_random_crops_have_the_asked_areas_and_ratios() -> None:
    rng = np.random.default_rng(0)
    boxes = [random_crop_box(400, 500, rng=rng) for _ in range(2000)]
    shares = np.array([box.height * box.width for box in boxes]) / (400 * 500)
    ratios = np.array([box.width / box.height for box in boxes])
    assert shares.min() > 0.075
    assert shares.max() <= 1
    assert ratios.min() > 0.74
    assert ratios.max() < 1.35
    # Not 0: in a image that is wider than high, more of the wide crops fit.
    assert abs(np.log(ratios).mean() - 0.028) < 0.012
    for box in boxes:
        assert 0 <= box.top <= 400 - box.height
        assert 0 <= box.left <= 500 - box.width


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(10, 1000, Box(0, 493, 10, 13)), (1000, 12, Box(492, 0, 16, 12)), (1, 1, Box(0, 0, 1, 1))],
)
def test_crop_of_an_extreme_image_falls_back_to_its_centre(
    height: int, width: int, expected: Box
) -> None:
    assert random_crop_box(height, width, rng=np.random.default_rng(0)) == expected


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_not_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 90} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    plain = _encoded(_image(20, 300), kind, **options)
    turned = _encoded(_image(20, 300), kind, exif=exif, **options)
    assert image_shape(turned, "x") == (20, 300)
    np.testing.assert_array_equal(decode_image(turned, "x"), decode_image(plain, "x"))
    crops = [
        decode_random_resized_crop(data, "x", size=8, rng=np.random.default_rng(3))
        for data in (turned, plain)
    ]
    np.testing.assert_array_equal(*crops)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_header_of_a_turned_tiff_says_what_decoding_gives(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _encoded(_image(20, 300), "TIFF", exif=exif)
    assert image_shape(data, "x") == decode_image(data, "x").shape[:2]
    crop = decode_random_resized_crop(data, "x", size=8, rng=np.random.default_rng(3))
    assert crop.shape == (8, 8, 3)
