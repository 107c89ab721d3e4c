import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from training_framework.data.color_jitter import color_jitter


@pytest.mark.parametrize("strength", [0.4, 1.5])
def test_each_image_changes_as_in_pillow(strength):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 9, 7), dtype=torch.uint8, generator=generator)
    draws = torch.rand(3, 8, generator=generator)
    ours = color_jitter(images, draws, strength)
    least = max(0.0, 1 - strength)
    for row in range(8):
        image = Image.fromarray(images[row].permute(1, 2, 0).numpy())
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhancer, draw in zip(enhancers, draws[:, row].tolist(), strict=True):
            image = enhancer(image).enhance(least + (1 + strength - least) * draw)
        apart = np.abs(np.asarray(image).astype(int) - ours[row].permute(1, 2, 0).numpy())
        # Truncation to whole levels: a factor that rounds otherwise moves a pixel by one.
        assert apart.max() <= 2 and (apart > 0).mean() < 0.02


def test_no_strength_changes_nothing():
    images = torch.arange(0, 240, dtype=torch.uint8).view(5, 3, 4, 4)
    assert torch.equal(color_jitter(images, torch.rand(3, 5), 0.0), images)
