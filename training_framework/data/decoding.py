"""From the bytes of a picture to the uint8 pixels that are wanted of it, and no more than those.

Pictures are taken as they are stored: an EXIF orientation is not applied and transparency is
dropped, as torchvision's loader does, whose crops these are.
"""

import io
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from training_framework.errors import UserError

__all__ = [
    "IMAGE_SUFFIXES",
    "Box",
    "Pixels",
    "decode_center_crop",
    "decode_image",
    "decode_random_resized_crop",
    "image_shape",
    "random_crop_box",
    "resize",
    "resize_and_center_crop",
]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 178_956_970  # where Pillow, too, takes a picture for a decompression bomb

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_JPEG_ERRORS = (ValueError, KeyError)  # KeyError where the header ends before the sampling factors
_CROP_ATTEMPTS = 10
_RESIZED_PER_CROPPED = 256 / 224
_LONGEST_SIDES = 4

Pixels = NDArray[np.uint8]


class Box(NamedTuple):
    """A rectangle of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


def image_shape(data: bytes, path: Path | str) -> tuple[int, int]:
    """Height and width in pixels, from the header alone.

    Args:
        data: The file's bytes.
        path: What to call it in errors.

    Raises:
        UserError: It is no picture of a known format, or has more than `MAX_PIXELS` pixels.
    """
    if _is_jpeg(data):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except _JPEG_ERRORS:
            height, width = _pillow_shape(data, path)
    else:
        height, width = _pillow_shape(data, path)
    if height * width > MAX_PIXELS:
        raise UserError(
            f"{path}: {width}x{height} pixels are more than {MAX_PIXELS}", "scale the picture down"
        )
    return height, width


def decode_image(
    data: bytes, path: Path | str, *, min_size: tuple[int, int] | None = None
) -> Pixels:
    """Decode a picture: (H, W, 3) uint8 RGB.

    JPEG goes through libjpeg-turbo, the rest (and CMYK, and what libjpeg-turbo complains of)
    through Pillow.

    Args:
        data: The file's bytes.
        path: What to call it in errors.
        min_size: Least height and width wanted: a JPEG is then decoded at 1/2, 1/4 or 1/8 of its
            size where that still suffices, which is cheaper. None is the whole size.

    Raises:
        UserError: It is truncated, no picture, or has more than `MAX_PIXELS` pixels.
    """
    height, width = image_shape(data, path)
    if _is_jpeg(data):
        factor = _decoding_factor(height, width, min_size or (height, width))
        try:
            if simplejpeg.decode_jpeg_header(data)[2] not in ("CMYK", "YCCK"):
                return simplejpeg.decode_jpeg(
                    data, min_height=-(-height // factor), min_width=-(-width // factor)
                )
        except _JPEG_ERRORS:
            pass  # Pillow takes some files that are unusual but whole, and explains the others
    return _decode_with_pillow(data, path)


def decode_random_resized_crop(
    data: bytes,
    path: Path | str,
    *,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Pixels:
    """A random crop of a picture, resized: (size, size, 3) uint8 RGB.

    The crop is chosen from the header, so that a JPEG is decoded no larger than the crop needs.

    Args:
        data: The file's bytes.
        path: What to call it in errors.
        size: Side of the result in pixels.
        rng: Draws the crop.
        scale: Least and largest area of the crop, as a share of the picture.
        ratio: Least and largest width over height of the crop.

    Raises:
        UserError: It is truncated, no picture, or has more than `MAX_PIXELS` pixels.
    """
    height, width = image_shape(data, path)
    box = random_crop_box(height, width, rng=rng, scale=scale, ratio=ratio)
    least = (math.ceil(height * size / box.height), math.ceil(width * size / box.width))
    pixels = decode_image(data, path, min_size=least)
    down, across = pixels.shape[0] / height, pixels.shape[1] / width
    crop_height, crop_width = max(1, round(box.height * down)), max(1, round(box.width * across))
    top = min(round(box.top * down), pixels.shape[0] - crop_height)
    left = min(round(box.left * across), pixels.shape[1] - crop_width)
    return resize(pixels[top : top + crop_height, left : left + crop_width], size, size)


def decode_center_crop(data: bytes, path: Path | str, *, size: int) -> Pixels:
    """The middle of a picture, resized: (size, size, 3) uint8 RGB.

    The shorter side becomes 256/224 of `size`, of which the middle is kept.

    Raises:
        UserError: It is truncated, no picture, or has more than `MAX_PIXELS` pixels.
    """
    shape = _resized_shape(*image_shape(data, path), size)
    return resize_and_center_crop(decode_image(data, path, min_size=shape), size)


def random_crop_box(
    height: int,
    width: int,
    *,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A crop of random area and aspect, as torchvision's RandomResizedCrop chooses it.

    Where none fits in ten attempts, it is the largest central one within the ratios.
    """
    for _ in range(_CROP_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return Box(top, left, crop_height, crop_width)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width = min(width, max(1, round(height * aspect)))
    crop_height = min(height, max(1, round(width / aspect)))
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def resize_and_center_crop(pixels: Pixels, size: int) -> Pixels:
    """The middle of a picture, as torchvision's Resize(256/224 of size), CenterCrop(size) keep it.

    Args:
        pixels: (H, W, 3) uint8.
        size: Side of the result in pixels.

    Returns:
        (size, size, 3) uint8.
    """
    pixels = _middle(pixels)
    height, width = _resized_shape(pixels.shape[0], pixels.shape[1], size)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resize(pixels, height, width)[top : top + size, left : left + size]


def resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize (H, W, 3) uint8 pixels: (height, width, 3), antialiased bilinear.

    PyTorch's resampling of uint8 is Pillow's (to one level), but takes the array as it is, where
    Pillow unpacks it into pixels of four bytes and packs it again.
    """
    writable = np.require(pixels, requirements="W")  # torch warns of arrays that are not
    image = torch.from_numpy(writable).permute(2, 0, 1).unsqueeze(0)
    resized = functional.interpolate(image, (height, width), mode="bilinear", antialias=True)
    return resized.squeeze(0).permute(1, 2, 0).numpy()


def _resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
    shorter = round(size * _RESIZED_PER_CROPPED)
    if height <= width:
        return shorter, shorter * width // height
    return shorter * height // width, shorter


def _middle(pixels: Pixels) -> Pixels:
    """Pixels without the ends of a very long picture, which resizing would blow up in vain."""
    height, width = pixels.shape[:2]
    top = max(0, (height - _LONGEST_SIDES * width) // 2)
    left = max(0, (width - _LONGEST_SIDES * height) // 2)
    return pixels[top : height - top, left : width - left]


def _decoding_factor(height: int, width: int, min_size: tuple[int, int]) -> int:
    """Largest of 1, 2, 4, 8 that leaves `min_size`; libjpeg-turbo is slower at those between."""
    for factor in (8, 4, 2):
        if height >= factor * min_size[0] and width >= factor * min_size[1]:
            return factor
    return 1


def _is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def _open_with_pillow(data: bytes, path: Path | str) -> Image.Image:
    with warnings.catch_warnings():
        # The limit here is ours; Pillow would warn at half of it.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=_FORMATS)
        except Image.DecompressionBombError:
            raise UserError(
                f"{path}: more than {MAX_PIXELS} pixels", "scale the picture down"
            ) from None
        except Exception:  # Pillow's readers raise whatever a broken header leads them to
            raise UserError(
                f"{path}: no picture of a known format ({', '.join(_FORMATS)})",
                "replace or delete the file",
            ) from None


def _pillow_shape(data: bytes, path: Path | str) -> tuple[int, int]:
    image = _open_with_pillow(data, path)
    return image.height, image.width


def _decode_with_pillow(data: bytes, path: Path | str) -> Pixels:
    image = _open_with_pillow(data, path)
    try:
        image.load()
    except Exception as error:  # as above
        raise UserError(
            f"{path}: cannot be decoded ({error})", "replace or delete the file"
        ) from None
    if image.mode.startswith("I"):
        # 16 bits a pixel, which Pillow would clip at 255.
        gray = np.asarray(image).astype(np.int64) >> 8
        return np.repeat(gray.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise UserError(f"{path}: float pixels have no known range", "save it with 8 bits a pixel")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))
