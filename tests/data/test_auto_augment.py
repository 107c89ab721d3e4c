"""Batch operations against the papers' per-image definitions, computed by Pillow."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from training_framework.data.auto_augment import (
    LEVELS,
    Operation,
    _blended,
    _looked_up,
    _moved,
    augment,
    magnitudes,
)

HEIGHT, WIDTH = 40, 32


def by_pillow(image: Image.Image, operation: Operation, value: float) -> Image.Image:
    """One operation of the papers' lists, on one image."""
    enhancers = {
        Operation.BRIGHTNESS: ImageEnhance.Brightness,
        Operation.COLOR: ImageEnhance.Color,
        Operation.CONTRAST: ImageEnhance.Contrast,
        Operation.SHARPNESS: ImageEnhance.Sharpness,
    }
    planes = {
        Operation.SHEAR_X: (1, value, 0, 0, 1, 0),
        Operation.SHEAR_Y: (1, 0, 0, value, 1, 0),
        Operation.TRANSLATE_X: (1, 0, -value, 0, 1, 0),
        Operation.TRANSLATE_Y: (1, 0, 0, 0, 1, -value),
    }
    if operation in enhancers:
        return enhancers[operation](image).enhance(1 + value)
    if operation in planes:
        return image.transform(image.size, Image.Transform.AFFINE, planes[operation])
    others = {
        Operation.ROTATE: lambda: image.rotate(value),
        Operation.POSTERIZE: lambda: ImageOps.posterize(image, int(value)),
        Operation.SOLARIZE: lambda: ImageOps.solarize(image, value),
        Operation.AUTOCONTRAST: lambda: ImageOps.autocontrast(image),
        Operation.EQUALIZE: lambda: ImageOps.equalize(image),
        Operation.IDENTITY: lambda: image,
    }
    return others[operation]()


def pictures(count: int) -> torch.Tensor:
    """Smooth random images of narrow ranges, one of them of a single level: (N, 3, H, W) uint8."""
    draws = np.random.default_rng(3)
    made = []
    for number in range(count):
        small = draws.integers(10 + number, 200, (5, 4, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        made.append(np.asarray(image.filter(ImageFilter.EDGE_ENHANCE)))
    made[0] = np.full_like(made[0], 77)
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("policy", ["trivial", "rand"])
@pytest.mark.parametrize("operation", Operation, ids=lambda operation: operation.name.lower())
def test_an_operation_is_the_papers_at_every_level_and_sign(policy, operation):
    images = pictures(6)
    table = magnitudes(policy, HEIGHT, WIDTH)
    levels = [0, 7, 15, 22, 29, 30]
    for sign in (0.2, 0.8):
        draws = torch.tensor(
            [
                [(operation + 0.5) / len(Operation)] * len(levels),
                [(level + 0.5) / LEVELS for level in levels],
                [sign] * len(levels),
            ]
        )
        ours = augment(images, draws, policy, magnitude=22)
        for row, level in enumerate(levels):
            value = table[operation][level if policy == "trivial" else 22]
            signed = Operation.SHEAR_X <= operation <= Operation.SHARPNESS
            if signed and sign < 0.5:
                value = -value
            image = Image.fromarray(images[row].permute(1, 2, 0).numpy())
            expected = np.asarray(by_pillow(image, operation, value)).astype(int)
            apart = np.abs(ours[row].permute(1, 2, 0).numpy() - expected)
            # Pillow moves pixels in fixed point, so a few on an edge come from a neighbour.
            moves = Operation.SHEAR_X <= operation <= Operation.ROTATE
            assert (apart > 1).mean() <= (0.03 if moves else 0), (level, value)


def test_every_image_of_a_batch_has_its_own_operation():
    images = pictures(6).repeat(5, 1, 1, 1)
    draws = torch.rand(3, len(images), generator=torch.Generator().manual_seed(0))
    draws[0] = (torch.arange(30) % len(Operation) + 0.5) / len(Operation)
    whole = augment(images, draws, "trivial")
    single = [augment(images[k : k + 1], draws[:, k : k + 1], "trivial") for k in range(30)]
    assert torch.equal(whole, torch.cat(single))
    assert whole.is_contiguous(memory_format=torch.channels_last)


def test_magnitudes_are_the_published_ranges():
    wide, narrow = magnitudes("trivial", 331, 331), magnitudes("rand", 331, 331)
    assert wide[Operation.ROTATE][-1] == 135 and narrow[Operation.ROTATE][-1] == 30
    assert wide[Operation.TRANSLATE_X][-1] == 32 and narrow[Operation.TRANSLATE_Y][-1] == 150
    assert wide[Operation.POSTERIZE][-1] == 2 and narrow[Operation.POSTERIZE][-1] == 4
    assert wide[Operation.SOLARIZE][0] == 255 and wide[Operation.SOLARIZE][-1] == 0
    assert math.isclose(wide[Operation.SHEAR_X][-1], 0.99)
    assert math.isclose(narrow[Operation.COLOR][-1], 0.9)


def test_passes_over_the_whole_batch_equal_those_over_the_images_concerned():
    """Accelerators take the first way, CPUs the second."""
    images = pictures(6).repeat(10, 1, 1, 1)
    operations = torch.arange(60) % len(Operation)
    draws = torch.stack([(operations + 0.5) / len(Operation), torch.rand(60), torch.zeros(60)])
    levels = (draws[1] * LEVELS).long()
    amounts = torch.tensor(magnitudes("trivial", HEIGHT, WIDTH))[operations, levels]
    signed = (operations >= Operation.SHEAR_X) & (operations <= Operation.SHARPNESS)
    amounts = torch.where(signed, -amounts, amounts)
    pixels = images.permute(0, 2, 3, 1).contiguous()
    for change in (_moved, _looked_up, _blended):
        pixels = change(pixels, operations, amounts)
    assert torch.equal(pixels.permute(0, 3, 1, 2), augment(images, draws, "trivial"))
