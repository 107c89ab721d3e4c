"""TrivialAugment and RandAugment for whole batches on their device.

The fourteen operations are Pillow's. Every image of a batch may draw another one, so each pass
covers several operations at once: one gather moves pixels (shear, translate, rotate), one table
lookup maps levels (brightness, contrast, posterize, solarize, autocontrast, equalize), and one
blend mixes neighbours or channels (color, sharpness). An image that drew something else passes
unchanged. Nothing is copied to the host.
"""

import functools
import math
from enum import IntEnum
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LEVELS", "AutoAugment", "Operation", "Policy", "augment", "luma", "magnitudes"]

Policy = Literal["trivial", "rand"]
AutoAugment = Literal["none", "trivial", "rand"]

LEVELS = 31
_TRIVIAL_TRANSLATION_PX = 32
_RAND_TRANSLATION = 150 / 331


class Operation(IntEnum):
    """What an image can draw; both papers list the same operations."""

    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    BRIGHTNESS = 6
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10
    SOLARIZE = 11
    AUTOCONTRAST = 12
    EQUALIZE = 13


_MOVES = (
    Operation.SHEAR_X,
    Operation.SHEAR_Y,
    Operation.TRANSLATE_X,
    Operation.TRANSLATE_Y,
    Operation.ROTATE,
)
_MAPS = (
    Operation.BRIGHTNESS,
    Operation.CONTRAST,
    Operation.POSTERIZE,
    Operation.SOLARIZE,
    Operation.AUTOCONTRAST,
    Operation.EQUALIZE,
)
_BLENDS = (Operation.COLOR, Operation.SHARPNESS)
_SIGNED = range(Operation.SHEAR_X, Operation.SHARPNESS + 1)
_BLENDED = range(Operation.BRIGHTNESS, Operation.SHARPNESS + 1)


def magnitudes(policy: Policy, height: int, width: int) -> list[list[float]]:
    """What each operation does at each level: (operations, LEVELS).

    Shears are slopes, translations pixels, rotations degrees; brightness, color, contrast and
    sharpness change by this share; posterize keeps so many bits, solarize inverts levels from here.

    Sources: Müller and Hutter, TrivialAugment, arXiv 2103.10158 (the wide space); Cubuk et al.,
    RandAugment, arXiv 1909.13719.

    Args:
        policy: Which paper's range.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
    """
    wide = policy == "trivial"
    most = dict.fromkeys(_BLENDED, 0.99 if wide else 0.9) | {
        Operation.SHEAR_X: 0.99 if wide else 0.3,
        Operation.SHEAR_Y: 0.99 if wide else 0.3,
        Operation.TRANSLATE_X: _TRIVIAL_TRANSLATION_PX if wide else _RAND_TRANSLATION * width,
        Operation.TRANSLATE_Y: _TRIVIAL_TRANSLATION_PX if wide else _RAND_TRANSLATION * height,
        Operation.ROTATE: 135.0 if wide else 30.0,
    }
    lost_bits = 6 if wide else 4
    shares = [level / (LEVELS - 1) for level in range(LEVELS)]
    table = [[most.get(operation, 0.0) * share for share in shares] for operation in Operation]
    for operation in (Operation.TRANSLATE_X, Operation.TRANSLATE_Y):
        table[operation] = [float(int(pixels)) for pixels in table[operation]]
    table[Operation.POSTERIZE] = [8.0 - round(lost_bits * share) for share in shares]
    table[Operation.SOLARIZE] = [float(round(255 * (1 - share))) for share in shares]
    return table


class _Tables(NamedTuple):
    magnitudes: Tensor
    signed: Tensor


@functools.lru_cache(maxsize=8)  # a copy from the host would wait in every step
def _tables(policy: Policy, height: int, width: int, device: torch.device) -> _Tables:
    signed = [operation in _SIGNED for operation in Operation]
    return _Tables(
        torch.tensor(magnitudes(policy, height, width), device=device).flatten(),
        torch.tensor(signed, device=device),
    )


def augment(images: Tensor, draws: Tensor, policy: Policy, *, magnitude: int = 9) -> Tensor:
    """Apply one random operation to each image.

    Args:
        images: (N, 3, H, W) uint8.
        draws: (3, N) uniform in [0, 1): the operation, its level (`trivial` only), its sign.
        policy: `trivial` draws the level evenly; `rand` always uses `magnitude`.
        magnitude: Level of `rand`, 0 to 30.

    Returns:
        (N, 3, H, W) uint8, channels_last in memory.
    """
    height, width = images.shape[2:]
    tables = _tables(policy, height, width, images.device)
    operations = (draws[0] * len(Operation)).long()
    levels = (
        (draws[1] * LEVELS).long()
        if policy == "trivial"
        else torch.full_like(operations, magnitude)
    )
    amounts = tables.magnitudes[operations * LEVELS + levels]
    amounts = torch.where(tables.signed[operations] & (draws[2] < 0.5), -amounts, amounts)
    pixels = images.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    passes = ((_moved, _MOVES), (_looked_up, _MAPS), (_blended, _BLENDS))
    for change, kinds in passes:
        if pixels.device.type != "cpu":  # finding the images that it concerns would wait
            pixels = change(pixels, operations, amounts)
            continue
        rows = torch.isin(operations, torch.tensor(kinds)).nonzero().squeeze(1)
        if len(rows):
            pixels[rows] = change(pixels[rows], operations[rows], amounts[rows])
    return pixels.permute(0, 3, 1, 2)


def _moved(pixels: Tensor, operations: Tensor, amounts: Tensor) -> Tensor:
    """Shear, translate or rotate (N, H, W, 3) pixels by nearest neighbours; the rest is black.

    Each pixel of the result reads the pixel at `a*x + b*y + c, d*x + e*y + f` of its image.
    """
    count, height, width, channels = pixels.shape

    def drawn(operation: Operation) -> Tensor:
        return torch.where(operations == operation, amounts, 0.0)

    angles = drawn(Operation.ROTATE) * (-math.pi / 180)
    cosines, sines = angles.cos(), angles.sin()
    x_per_y = sines + drawn(Operation.SHEAR_X)
    y_per_x = -sines + drawn(Operation.SHEAR_Y)
    # Rotations turn around the middle; the others start at the upper left corner.
    x_start = (width - cosines * width - sines * height) / 2 - drawn(Operation.TRANSLATE_X)
    y_start = (height + sines * width - cosines * height) / 2 - drawn(Operation.TRANSLATE_Y)
    x = torch.arange(width, device=pixels.device) + 0.5
    y = torch.arange(height, device=pixels.device)[:, None] + 0.5

    def plane(per_x: Tensor, per_y: Tensor, start: Tensor) -> Tensor:
        return (per_x[:, None, None] * x + per_y[:, None, None] * y + start[:, None, None]).floor()

    columns = plane(cosines, x_per_y, x_start)
    rows = plane(y_per_x, cosines, y_start)
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    # Integers: floats would no longer count the pixels of a large batch exactly.
    first = torch.arange(count, device=pixels.device)[:, None, None] * (height * width)
    sources = (
        first + torch.where(inside, rows, 0).int() * width + torch.where(inside, columns, 0).int()
    )
    moved = pixels.view(-1, channels).index_select(0, sources.view(-1)).view(pixels.shape)
    return moved * inside[..., None]


def _looked_up(pixels: Tensor, operations: Tensor, amounts: Tensor) -> Tensor:
    """Map the levels of (N, H, W, 3) pixels by a table for each image and channel."""
    count, channels, device = len(pixels), pixels.shape[3], pixels.device
    levels = torch.arange(256.0, device=device)
    amounts, operations = amounts[:, None, None], operations[:, None, None]
    flat = pixels.view(count, -1, channels)
    low = flat.amin(1).float()[..., None]
    high = flat.amax(1).float()[..., None]
    gray = (luma(flat).mean(1) + 0.5).floor()[:, None, None]
    step = torch.exp2(8 - torch.where(operations == Operation.POSTERIZE, amounts, 8.0))
    # Each row of the table is exact for images that drew it, and may be nonsense for the others.
    scale = 255 / (high - low).clamp(min=1)
    places = (torch.arange(count, device=device)[:, None] * channels) * 256
    places = places + torch.arange(channels, device=device) * 256
    indices = (flat + places[:, None, :]).view(-1)
    maps = {
        Operation.BRIGHTNESS: levels * (1 + amounts),
        Operation.CONTRAST: gray + (levels - gray) * (1 + amounts),
        Operation.POSTERIZE: levels - levels % step,
        Operation.SOLARIZE: torch.where(levels < amounts, levels, 255 - levels),
        Operation.AUTOCONTRAST: torch.where(
            high > low, (levels * scale - low * scale).trunc(), levels
        ),
        Operation.EQUALIZE: _equalizing(indices, count * channels).view(count, channels, 256),
    }
    table = levels.expand(count, channels, 256)
    for operation, mapped in maps.items():
        table = torch.where(operations == operation, mapped, table)
    table = table.clamp(0, 255).to(torch.uint8)
    return table.reshape(-1).index_select(0, indices).view(pixels.shape)


def _equalizing(indices: Tensor, rows: int) -> Tensor:
    """Tables that make each histogram even: (rows, 256) float.

    Args:
        indices: 256 times the row, plus the level, of each pixel.
        rows: Histograms.
    """
    counts = torch.zeros(rows * 256, dtype=torch.int32, device=indices.device)
    one = torch.ones((), dtype=torch.int32, device=indices.device)
    counts.scatter_add_(0, indices, one.expand(len(indices)))
    counts = counts.view(rows, 256)
    levels = torch.arange(256, device=indices.device)
    last = torch.where(counts > 0, levels, 0).amax(1, keepdim=True)
    total = counts.sum(1, keepdim=True)
    step = (total - counts.gather(1, last)) // 255
    before = counts.cumsum(1) - counts
    even = (step // 2 + before) // step.clamp(min=1)
    return torch.where(step > 0, even, levels).float()


def _blended(pixels: Tensor, operations: Tensor, amounts: Tensor) -> Tensor:
    """Change the saturation or the sharpness of (N, H, W, 3) pixels."""
    operations, amounts = operations[:, None, None, None], amounts[:, None, None, None]
    original = pixels.float()
    # Pillow's SMOOTH: the middle counts five times, and the border stays.
    sums = F.avg_pool2d(original.permute(0, 3, 1, 2), 3, 1, divisor_override=1).permute(0, 2, 3, 1)
    smooth = original.clone()
    inner = original[:, 1:-1, 1:-1]
    smooth[:, 1:-1, 1:-1] = ((sums + 4 * inner) / 13 + 0.5).floor()
    other = torch.where(operations == Operation.SHARPNESS, smooth, luma(pixels)[..., None])
    is_blended = (operations == Operation.SHARPNESS) | (operations == Operation.COLOR)
    mixed = (other + (original - other) * (1 + amounts)).clamp(0, 255).to(torch.uint8)
    return torch.where(is_blended, mixed, pixels)


def luma(pixels: Tensor) -> Tensor:
    """Gray levels of (..., 3) RGB pixels, in Pillow's weights: (...) float, whole numbers."""
    red, green, blue = pixels.int().unbind(-1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).float()
