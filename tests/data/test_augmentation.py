import math

import numpy as np
import pytest
import torch
from torch import Tensor

from training_framework.data import augmentation
from training_framework.errors import UserError


def _pixels(count: int = 6, height: int = 9, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def _is_channels_last(images: Tensor) -> bool:
    return images.is_contiguous(memory_format=torch.channels_last)


def test_flip_mirrors_the_flagged_images_alone() -> None:
    images = _pixels()
    flags = torch.tensor([True, False, True, True, False, False])
    flipped = augmentation.flip(images, flags)
    for got, image, flag in zip(flipped, images, flags, strict=True):
        expected = np.flip(image.numpy(), axis=2) if flag else image.numpy()
        np.testing.assert_array_equal(got.numpy(), expected)


def test_alternating_flip_shows_each_image_on_both_sides_in_two_epochs() -> None:
    first_sides = torch.tensor([True, False, True])
    epochs = [augmentation.alternating_flip_flags(first_sides, epoch) for epoch in range(4)]
    assert torch.equal(epochs[0], first_sides)
    assert torch.equal(epochs[1], ~first_sides)
    assert torch.equal(epochs[2], epochs[0])
    assert torch.equal(epochs[3], epochs[1])


@pytest.mark.parametrize("padding", [1, 3, 8])
@pytest.mark.parametrize("channels_last", [True, False])
def test_crop_equals_reflect_padding_and_slicing(padding: int, channels_last: bool) -> None:
    images = _pixels(count=20)
    generator = torch.Generator().manual_seed(0)
    offsets_y, offsets_x = torch.randint(0, 2 * padding + 1, (2, 20), generator=generator)
    given = images.contiguous(memory_format=torch.channels_last) if channels_last else images
    cropped = augmentation.pad_and_crop(given, padding, offsets_y, offsets_x)
    sides = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    padded = np.pad(images.numpy(), sides, mode="reflect")
    for row, (top, left) in enumerate(zip(offsets_y, offsets_x, strict=True)):
        expected = padded[row, :, top : top + 9, left : left + 12]
        np.testing.assert_array_equal(cropped[row].numpy(), expected)
    assert _is_channels_last(cropped)


def test_crop_for_accelerators_equals_the_crop_for_cpus() -> None:
    images = _pixels(count=20).permute(0, 2, 3, 1).contiguous()
    offsets_y, offsets_x = torch.randint(0, 7, (2, 20), generator=torch.Generator().manual_seed(1))
    rows = augmentation._reflected(offsets_y[:, None] + torch.arange(9), 3, 9)
    by_index = augmentation._crop_by_index(images, 3, rows, offsets_x)
    by_windows = augmentation._crop_by_windows(images, 3, rows, offsets_x)
    assert torch.equal(by_index, by_windows)


def test_padding_that_cannot_be_reflected_is_an_error() -> None:
    zeros = torch.zeros(6, dtype=torch.long)
    with pytest.raises(UserError, match=r"crop_padding of 9 px .* 12x9 px; use .* below 9"):
        augmentation.pad_and_crop(_pixels(), 9, zeros, zeros)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_cutout_equals_a_loop_over_pixels(size: int, memory_format: torch.memory_format) -> None:
    images = (_pixels().float() + 1).contiguous(memory_format=memory_format)
    centers_y, centers_x = torch.tensor([0, 8, 4, 3, 2, 7]), torch.tensor([0, 11, 5, 6, 10, 1])
    cut = augmentation.cutout(images, size, centers_y, centers_x)
    expected = images.clone()
    for image, center_y, center_x in zip(expected, centers_y, centers_x, strict=True):
        top, left = int(center_y) - size // 2, int(center_x) - size // 2
        for row in range(max(0, top), min(9, top + size)):
            for column in range(max(0, left), min(12, left + size)):
                image[:, row, column] = 0
    assert torch.equal(cut, expected)
    assert cut.is_contiguous(memory_format=memory_format)


def test_random_erasing_takes_its_share_of_images_and_of_their_area() -> None:
    images = torch.ones(4000, 1, 32, 32)
    draws = torch.rand((5, 4000), generator=torch.Generator().manual_seed(0))
    erased = augmentation.random_erasing(images, draws, probability=0.4)
    areas = (erased == 0).float().mean(dim=(1, 2, 3))
    assert torch.equal(areas > 0, draws[0] < 0.4)
    hit = areas[areas > 0]
    assert float(hit.min()) > 0.01
    assert float(hit.max()) < 0.36
    # The mean of a uniform draw between 2% and a third, less what the sides cut off.
    assert math.isclose(float(hit.mean()), (0.02 + 1 / 3) / 2, rel_tol=0.06)


def test_random_erasing_erases_one_rectangle_inside_the_image() -> None:
    draws = torch.rand((5, 50), generator=torch.Generator().manual_seed(2))
    erased = augmentation.random_erasing(torch.ones(50, 3, 20, 30), draws, probability=1.0)
    for image in erased:
        zeros = (image == 0).all(dim=0)
        assert torch.equal(zeros, (image == 0).any(dim=0))
        assert int(zeros.sum()) == int(zeros.any(1).sum()) * int(zeros.any(0).sum())


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("channels_last_input", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)],
)
def test_normalization_equals_float64(
    memory_format: torch.memory_format,
    channels_last_input: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    images = _pixels()
    given = images.contiguous(memory_format=torch.channels_last) if channels_last_input else images
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    scale, shift = augmentation.scale_and_shift(mean, std, "cpu")
    result = augmentation.normalize(given, scale, shift, dtype=dtype, memory_format=memory_format)
    exact = images.numpy().astype(np.float64) / 255
    exact = (exact - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=memory_format)
    np.testing.assert_allclose(result.double().numpy(), exact, rtol=tolerance, atol=1e-6)


def test_mixup_blends_with_the_image_before() -> None:
    images = _pixels().double()
    mixed = augmentation.mixup(images, torch.tensor(0.7))
    torch.testing.assert_close(mixed, 0.3 * images + 0.7 * images.roll(1, 0))


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("center", [(0.0, 0.0), (0.5, 0.5), (0.99, 0.2)])
def test_cutmix_pastes_one_rectangle_and_tells_its_true_share(
    lam: float, center: tuple[float, float]
) -> None:
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 20, 30).contiguous()
    rectangle, own = augmentation.cutmix_rectangle(
        20, 30, lam, center_y=center[0], center_x=center[1]
    )
    mixed = augmentation.cutmix(images, torch.tensor(rectangle, dtype=torch.float32))
    pasted = mixed != images
    assert torch.equal(mixed[pasted], images.roll(1, 0)[pasted])
    assert math.isclose(1 - own, float(pasted.float().mean()), abs_tol=1e-6)
    if center == (0.5, 0.5):
        assert math.isclose(own, lam, abs_tol=0.1)


def test_layout_survives_every_function() -> None:
    images = _pixels().float().contiguous(memory_format=torch.channels_last)
    zeros = torch.zeros(6, dtype=torch.long)
    draws = torch.full((5, 6), 0.5)
    for result in (
        augmentation.flip(images, zeros.bool()),
        augmentation.cutout(images, 4, zeros, zeros),
        augmentation.random_erasing(images, draws, probability=1.0),
        augmentation.mixup(images, torch.tensor(0.5)),
        augmentation.cutmix(images, torch.tensor([2.0, 5.0, 1.0, 4.0])),
    ):
        assert _is_channels_last(result)
