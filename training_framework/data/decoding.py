"""Decode an image file to uint8 pixels, and only the part that is needed.

Images are used as they are stored, as in torchvision's loader, and the crops are torchvision's too:
no EXIF orientation is applied (except by Pillow to a TIFF), and transparency is dropped.
"""

import io
import math
import warnings
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from training_framework.data.jpeg_regions import Box, Region, decode_region
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
MAX_PIXELS = 178_956_970  # Pillow, too, treats larger images as decompression bombs

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_JPEG_ERRORS = (ValueError, KeyError)  # KeyError: the header ends before the sampling factors
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of a TIFF
_CROP_ATTEMPTS = 10
_RESIZED_PER_CROPPED = 256 / 224
_LONGEST_SIDES = 4
# Decode at least this many pixels for each pixel of the result: then decoding at a smaller scale
# and resizing differs from resizing the whole image by only about 1 level of 255.
_OVERSAMPLING = 1.5

_resample = torch.ops.aten._upsample_bilinear2d_aa.out

Pixels = NDArray[np.uint8]


def image_shape(data: bytes, path: Path | str) -> tuple[int, int]:
    """Height and width in pixels, from the header alone.

    Args:
        data: The file's bytes.
        path: Name of the file in errors.

    Raises:
        UserError: It is not an image of a known format, or has more than `MAX_PIXELS` pixels.
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
            f"{path}: {width}x{height} pixels are more than {MAX_PIXELS}", "scale the image down"
        )
    return height, width


def decode_image(
    data: bytes, path: Path | str, *, min_size: tuple[int, int] | None = None
) -> Pixels:
    """Decode an image: (H, W, 3) uint8 RGB.

    libjpeg-turbo decodes JPEGs. Pillow decodes everything else, including CMYK and files that
    libjpeg-turbo rejects.

    Args:
        data: The file's bytes.
        path: Name of the file in errors.
        min_size: Smallest height and width needed: if 1/2, 1/4 or 1/8 of its size suffices, a JPEG
            is decoded at that size, which is cheaper. None: the whole size.

    Raises:
        UserError: It is truncated, not an image, or has more than `MAX_PIXELS` pixels.
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
            pass  # Pillow reads some files that are unusual but whole, and explains the rest
    return _decode_with_pillow(data, path)


def decode_random_resized_crop(
    data: bytes,
    path: Path | str,
    *,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    out: Pixels | None = None,
) -> Pixels:
    """A random crop of an image, resized: (size, size, 3) uint8 RGB.

    The crop is chosen from the header alone. So a JPEG is decoded no larger than the crop needs,
    and as little as possible outside the crop. If it is decoded at 1/2, 1/4 or 1/8 of its size, the
    edges of the crop move to the nearest multiples of 2, 4 or 8 pixels.

    Args:
        data: The file's bytes.
        path: Name of the file in errors.
        size: Side of the result in pixels.
        rng: Draws the crop.
        scale: Smallest and largest area of the crop, as a share of the image.
        ratio: Smallest and largest ratio of the crop's width to its height.
        out: Array for the result; None: a new one.

    Raises:
        UserError: It is not an image, has more than `MAX_PIXELS` pixels, or a part that has
            to be read is damaged.
    """
    height, width = image_shape(data, path)
    box = random_crop_box(height, width, rng=rng, scale=scale, ratio=ratio)
    wanted = math.ceil(_OVERSAMPLING * size)
    factor = _decoding_factor(box.height, box.width, (wanted, wanted)) if _is_jpeg(data) else 1
    box = _on_grid(box, factor)
    region = decode_region(data, box, factor=factor) if _is_jpeg(data) else None
    if region is None:
        pixels = decode_image(data, path, min_size=(height // factor, width // factor))
        region = Region(pixels, 0, 0)
        if pixels.shape[:2] == (height, width):  # decoded by Pillow, which ignores min_size
            factor = 1
    top, left = box.top // factor - region.top, box.left // factor - region.left
    crop = region.pixels[top : top + box.height // factor, left : left + box.width // factor]
    return resize(crop, size, size, out=out)


def decode_center_crop(
    data: bytes, path: Path | str, *, size: int, out: Pixels | None = None
) -> Pixels:
    """The middle of an image, resized: (size, size, 3) uint8 RGB.

    The shorter side is scaled to 256/224 of `size`, and the middle is kept.

    Args:
        data: The file's bytes.
        path: Name of the file in errors.
        size: Side of the result in pixels.
        out: Array for the result; None: a new one.

    Raises:
        UserError: It is truncated, not an image, or has more than `MAX_PIXELS` pixels.
    """
    height, width = _resized_shape(*image_shape(data, path), size)
    wanted = math.ceil(_OVERSAMPLING * height), math.ceil(_OVERSAMPLING * width)
    crop = resize_and_center_crop(decode_image(data, path, min_size=wanted), size)
    if out is None:
        return crop
    out[:] = crop
    return out


def random_crop_box(
    height: int,
    width: int,
    *,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A crop of random area and aspect, as torchvision's RandomResizedCrop chooses it.

    If none fits in ten attempts, the result is the largest central crop within the ratios.
    """
    least, most = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_ATTEMPTS):
        of_area, of_ratio, of_top, of_left = rng.random(4).tolist()  # one call, for speed
        area = height * width * (scale[0] + (scale[1] - scale[0]) * of_area)
        aspect = math.exp(least + (most - least) * of_ratio)
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(of_top * (height - crop_height + 1))
            left = int(of_left * (width - crop_width + 1))
            return Box(top, left, crop_height, crop_width)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width = min(width, max(1, round(height * aspect)))
    crop_height = min(height, max(1, round(width / aspect)))
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def resize_and_center_crop(pixels: Pixels, size: int) -> Pixels:
    """The middle of an image, like torchvision's Resize(256/224 of size) and CenterCrop(size).

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


def resize(pixels: Pixels, height: int, width: int, *, out: Pixels | None = None) -> Pixels:
    """Resize (H, W, 3) uint8 pixels: (height, width, 3), antialiased bilinear.

    PyTorch resamples uint8 as Pillow does (to one level), but reads the array directly, whereas
    Pillow unpacks it into pixels of four bytes and packs it again.

    Args:
        pixels: (H, W, 3) uint8.
        height: Of the result.
        width: Of the result.
        out: Contiguous array for the result; None: a new one.
    """
    if out is None:
        out = np.empty((height, width, 3), dtype=np.uint8)
    # Contiguous, since reading rows of a wider image costs more than a copy; writable, since torch
    # warns about read-only arrays.
    source = np.require(pixels, requirements=("C", "W"))
    # The same computation as functional.interpolate(antialias=True). That would write the result
    # channel by channel, which takes as long again, and so does interleaving them afterwards.
    _resample(_as_batch(source), [height, width], False, out=_as_batch(out))
    return out


def _as_batch(pixels: Pixels) -> torch.Tensor:
    """A view of (H, W, 3) pixels as (1, 3, H, W), channels_last."""
    return torch.from_numpy(pixels[None]).permute(0, 3, 1, 2)


def _on_grid(box: Box, factor: int) -> Box:
    """The box with its edges on multiples of `factor`, where pixels of that scale begin.

    Edges between them would shift the image, which changes it more than anything else here.
    """
    if factor == 1:
        return box
    top, left, bottom, right = (
        (edge + factor // 2) // factor * factor
        for edge in (box.top, box.left, box.top + box.height, box.left + box.width)
    )
    return Box(top, left, bottom - top, right - left)


def _resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
    shorter = round(size * _RESIZED_PER_CROPPED)
    if height <= width:
        return shorter, shorter * width // height
    return shorter * height // width, shorter


def _middle(pixels: Pixels) -> Pixels:
    """Drop the ends of a very long image, which would be resized only to be cropped off."""
    height, width = pixels.shape[:2]
    top = max(0, (height - _LONGEST_SIDES * width) // 2)
    left = max(0, (width - _LONGEST_SIDES * height) // 2)
    return pixels[top : height - top, left : width - left]


def _decoding_factor(height: int, width: int, min_size: tuple[int, int]) -> int:
    """Largest of 1, 2, 4, 8 that leaves `min_size`; libjpeg-turbo is slower at other factors."""
    for factor in (8, 4, 2):
        if height >= factor * min_size[0] and width >= factor * min_size[1]:
            return factor
    return 1


def _is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def _open_with_pillow(data: bytes, path: Path | str) -> Image.Image:
    with warnings.catch_warnings():
        # We check the limit ourselves; Pillow would warn at half of it.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=_FORMATS)
        except Image.DecompressionBombError:
            raise UserError(
                f"{path}: more than {MAX_PIXELS} pixels", "scale the image down"
            ) from None
        except Exception:  # a broken header can make Pillow's readers raise anything
            raise UserError(
                f"{path}: not an image of a known format ({', '.join(_FORMATS)})",
                "replace or delete the file",
            ) from None


def _pillow_shape(data: bytes, path: Path | str) -> tuple[int, int]:
    image = _open_with_pillow(data, path)
    if isinstance(image, TiffImageFile):
        # A tile is decoded whole, even if the image shows only a small part of it.
        width, height = (image.tag_v2.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_LENGTH))
        if width * height > MAX_PIXELS:
            raise UserError(
                f"{path}: a tile of {width}x{height} pixels is more than {MAX_PIXELS}",
                "replace or delete the file",
            )
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
        # 16 bits per pixel, which Pillow would clip at 255.
        gray = np.asarray(image) >> 8
        return np.repeat(gray.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise UserError(
            f"{path}: float pixels have no known range", "save it with 8 bits per pixel"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))
