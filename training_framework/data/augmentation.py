"""Augmentation of whole batches on their device: pure functions that take the draws as arguments.

None of them copies a tensor to the host, so the device never waits.
"""

import math

import torch
from torch import Tensor

from training_framework.errors import UserError

__all__ = [
    "alternating_flip_flags",
    "cutmix",
    "cutmix_rectangle",
    "cutout",
    "flip",
    "mixup",
    "normalize",
    "normalize_rows",
    "pad_and_crop",
    "random_erasing",
    "scale_and_shift",
]


def flip(images: Tensor, flags: Tensor) -> Tensor:
    """Mirror the flagged images left to right.

    Args:
        images: (N, C, H, W), any dtype.
        flags: (N,) bool on the same device.

    Returns:
        (N, C, H, W), channels_last in memory.
    """
    both = torch.cat((_as_nhwc(images), _as_nhwc(images.flip(3))))
    chosen = torch.arange(len(images), device=images.device) + flags * len(images)
    return both.index_select(0, chosen).permute(0, 3, 1, 2)


def alternating_flip_flags(first_sides: Tensor, epoch: int) -> Tensor:
    """Which images to mirror so that each one flips every epoch.

    Source: K. Jordan, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU, arXiv 2404.00498.

    Args:
        first_sides: (N,) bool, drawn once per sample: whether it is mirrored in the first epoch.
        epoch: Counted from 0.

    Returns:
        (N,) bool.
    """
    return first_sides.logical_not() if epoch % 2 else first_sides


def pad_and_crop(images: Tensor, padding: int, offsets_y: Tensor, offsets_x: Tensor) -> Tensor:
    """Shift each image: pad it by reflection, then crop it to its old size.

    Args:
        images: (N, C, H, W), any dtype.
        padding: Pixels on every side, smaller than H and W.
        offsets_y: (N,) int64 in 0..2*padding, top of the crop in the padded image.
        offsets_x: (N,) int64 in 0..2*padding, left of the crop.

    Returns:
        (N, C, H, W), channels_last in memory.

    Raises:
        UserError: The padding is not smaller than the images.
    """
    height, width = images.shape[2:]
    if padding >= min(height, width):
        raise UserError(
            f"crop_padding of {padding} px cannot be reflected in images of {width}x{height} px",
            f"use a crop_padding below {min(height, width)}",
        )
    rows = _reflected(
        offsets_y[:, None] + torch.arange(height, device=images.device), padding, height
    )
    crop = _crop_by_windows if images.device.type == "cpu" else _crop_by_index
    return crop(_as_nhwc(images), padding, rows, offsets_x).permute(0, 3, 1, 2)


def _crop_by_index(images: Tensor, padding: int, rows: Tensor, offsets_x: Tensor) -> Tensor:
    """Crop (N, H, W, C) images by one gather over their pixels, which is fast on accelerators."""
    count, _, width, _ = images.shape
    columns = offsets_x[:, None] + torch.arange(width, device=images.device)
    columns = _reflected(columns, padding, width)
    samples = torch.arange(count, device=images.device)
    return images[samples[:, None, None], rows[:, :, None], columns[:, None, :]]


def _crop_by_windows(images: Tensor, padding: int, rows: Tensor, offsets_x: Tensor) -> Tensor:
    """Crop (N, H, W, C) images row by row, which is fast on CPUs.

    There, gathering single pixels is several times slower than copying whole rows. So the images
    are padded in memory, and each output row is one contiguous window of them.
    """
    count, height, width, channels = images.shape
    wide = images.new_empty((count, height, width + 2 * padding, channels))
    wide[:, :, padding : padding + width] = images
    for column in range(1, padding + 1):
        wide[:, :, padding - column] = images[:, :, column]
        wide[:, :, padding + width - 1 + column] = images[:, :, width - 1 - column]
    row_length = wide.shape[2] * channels
    window_length = width * channels
    windows = wide.as_strided((wide.numel() - window_length + 1, window_length), (1, 1))
    samples = torch.arange(count)[:, None] * height
    starts = (samples + rows) * row_length + offsets_x[:, None] * channels
    return windows.index_select(0, starts.reshape(-1)).view(images.shape)


def _reflected(positions: Tensor, padding: int, length: int) -> Tensor:
    """Map positions in a padded line to the line itself, by reflection that omits the edge."""
    inside = (positions - padding).abs()
    return (length - 1) - (inside - (length - 1)).abs()


def cutout(images: Tensor, size: int, centers_y: Tensor, centers_x: Tensor) -> Tensor:
    """Set a square of each image to 0, the mean of normalized images.

    Source: DeVries and Taylor, arXiv 1708.04552; squares may extend beyond the edge.

    Args:
        images: (N, C, H, W) float, normalized.
        size: Side of the square in pixels.
        centers_y: (N,) int64 rows; the square starts `size // 2` before them.
        centers_x: (N,) int64 columns; the square starts `size // 2` before them.
    """
    tops, lefts = centers_y - size // 2, centers_x - size // 2
    return _erase(images, tops, lefts, tops + size, lefts + size)


def random_erasing(
    images: Tensor,
    draws: Tensor,
    *,
    probability: float,
    scale: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 10 / 3),
) -> Tensor:
    """Set a random rectangle of some images to 0, the mean of normalized images.

    Source: Zhong et al., arXiv 1708.04896. Where the paper redraws a rectangle that does not fit,
    this one is cut to the side of the image.

    Args:
        images: (N, C, H, W) float, normalized.
        draws: (5, N) uniform in [0, 1): whether to erase, area, aspect, row, column.
        probability: Probability that an image loses a rectangle.
        scale: Smallest and largest area as a share of the image.
        ratio: Smallest and largest ratio of height to width.
    """
    height, width = images.shape[2:]
    whether, area, aspect, row, column = draws
    area = (scale[0] + (scale[1] - scale[0]) * area) * (height * width)
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * aspect)
    heights = (area * aspect).sqrt().round().clamp(max=height) * (whether < probability)
    widths = (area / aspect).sqrt().round().clamp(max=width)
    tops = (row * (height - heights + 1)).floor()
    lefts = (column * (width - widths + 1)).floor()
    return _erase(images, tops, lefts, tops + heights, lefts + widths)


def _erase(images: Tensor, tops: Tensor, lefts: Tensor, bottoms: Tensor, rights: Tensor) -> Tensor:
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    in_rows = (rows >= tops[:, None]) & (rows < bottoms[:, None])
    in_columns = (columns >= lefts[:, None]) & (columns < rights[:, None])
    erased = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    # The functional form would lose channels_last.
    return images.clone().masked_fill_(erased, 0)


def scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """The two factors of `normalize`, (C,) float32 each: `pixel * scale + shift`.

    Args:
        mean: Per-channel mean, in units where 255 is 1.
        std: Per-channel standard deviation, same units.
        device: Where the images are.
    """
    scale = torch.tensor([1 / (255 * deviation) for deviation in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale, shift


def normalize(
    images: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """Turn uint8 images into floats of mean 0 and deviation 1, in their final layout.

    The computation is in float32 whatever the dtype of the result.

    Args:
        images: (N, C, H, W) uint8.
        scale: (C,) float32 on the images' device, from `scale_and_shift`.
        shift: (C,) float32.
        dtype: Of the result.
        memory_format: Of the result.
    """
    if images.device.type == "cpu" and memory_format == torch.channels_last:
        width = images.shape[3]
        return normalize_rows(images, scale.repeat(width), shift.repeat(width), dtype=dtype)
    result = torch.empty(
        images.shape, dtype=dtype, device=images.device, memory_format=memory_format
    )
    return torch.addcmul(shift.view(-1, 1, 1), images, scale.view(-1, 1, 1), out=result)


def normalize_rows(
    images: Tensor, scale: Tensor, shift: Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`normalize` to channels_last for CPUs, with the factors repeated for a whole row.

    An innermost loop over three channels does not vectorize; a loop over a row does.

    Args:
        images: (N, C, H, W) uint8.
        scale: (W * C,) float32, the factors of the channels repeated W times.
        shift: (W * C,) float32, repeated in the same way.
        dtype: Of the result.
    """
    pixels = _as_nhwc(images)
    # Promoting uint8 within the multiply-add would allocate another copy of the batch.
    rows = pixels.view(-1, scale.shape[0]).float()
    torch.addcmul(shift, rows, scale, out=rows)
    if dtype != torch.float32:
        rows = rows.to(dtype)
    return rows.view(pixels.shape).permute(0, 3, 1, 2)


def mixup(images: Tensor, other_share: Tensor) -> Tensor:
    """Blend each image with the one before it in the batch: `(1 - share) * own + share * other`.

    Source: Zhang et al., arXiv 1710.09412. The other image's label is `labels.roll(1)`.

    Args:
        images: (N, C, H, W) float.
        other_share: () float32 on the images' device, weight of the other image.
    """
    mixed, other_share = torch.empty_like(images), other_share.to(images.dtype)
    torch.lerp(images[1:], images[:-1], other_share, out=mixed[1:])
    torch.lerp(images[:1], images[-1:], other_share, out=mixed[:1])
    return mixed


def cutmix(images: Tensor, rectangle: Tensor) -> Tensor:
    """Replace a rectangle of each image by that of the image before it in the batch.

    Source: Yun et al., arXiv 1905.04899. The rectangle is the same for the whole batch. The other
    image's label is `labels.roll(1)`.

    Args:
        images: (N, C, H, W).
        rectangle: (4,) float32 on the images' device: top, bottom, left and right, of which bottom
            and right are outside. An empty rectangle changes nothing.
    """
    top, bottom, left, right = rectangle
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    in_rows = (rows >= top) & (rows < bottom)
    inside = in_rows[:, None] & (columns >= left) & (columns < right)
    mixed = torch.empty_like(images)
    torch.where(inside, images[:-1], images[1:], out=mixed[1:])
    torch.where(inside, images[-1:], images[:1], out=mixed[:1])
    return mixed


def cutmix_rectangle(
    height: int, width: int, lam: float, *, center_y: float, center_x: float
) -> tuple[tuple[int, int, int, int], float]:
    """The rectangle of `cutmix`, cut off at the edge.

    Args:
        height: Of the images.
        width: Of the images.
        lam: Desired share of each image that remains.
        center_y: Centre of the rectangle, as a share of the height.
        center_x: Centre of the rectangle, as a share of the width.

    Returns:
        Top, bottom, left and right, and the share of each image that actually remains.
    """
    top, bottom = _cut(height, lam, center_y)
    left, right = _cut(width, lam, center_x)
    remains = 1 - (bottom - top) * (right - left) / (height * width)
    return (top, bottom, left, right), remains


def _cut(length: int, lam: float, center: float) -> tuple[int, int]:
    half = int(length * math.sqrt(1 - lam)) / 2
    middle = int(center * length)
    return max(0, math.floor(middle - half)), min(length, math.floor(middle + half))


def _as_nhwc(images: Tensor) -> Tensor:
    """(N, C, H, W) images as contiguous (N, H, W, C); free if they are channels_last."""
    return images.permute(0, 2, 3, 1).contiguous()
