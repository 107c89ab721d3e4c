import pytest
import torch
from torch import nn

from training_framework.models import build_model
from training_framework.models.norms import freeze_norm_scales, set_norm_momentum
from training_framework.models.whitening import (
    SMALLEST_VARIANCE,
    freeze_first_convolution,
    whiten_first_convolution,
)


@pytest.fixture(scope="module")
def images():
    """Images whose neighbouring pixels are alike, as in photographs."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100, 3, 18, 18, generator=generator)
    return nn.functional.avg_pool2d(noise, 3, stride=1)


def first_convolution(filters, **options):
    model = nn.Module()
    model.conv1 = nn.Conv2d(3, filters, **options)
    return model


def test_outputs_are_uncorrelated_with_variance_one(images):
    model = first_convolution(54, kernel_size=3)
    whiten_first_convolution(model, images.split(30))
    outputs = model.conv1(images)[:, :27].transpose(0, 1).flatten(1)
    products = outputs @ outputs.T / outputs.shape[1]
    # What is added to the variances keeps those of the finest patterns below 1.
    torch.testing.assert_close(products - products.diag().diag(), torch.zeros(27, 27), atol=1e-3,
                               rtol=0)  # fmt: skip
    patches = nn.functional.unfold(images, 3).transpose(0, 1).flatten(1)
    variances = torch.linalg.eigvalsh(patches @ patches.T / patches.shape[1]).flip(0)
    torch.testing.assert_close(
        products.diag(), variances / (variances + SMALLEST_VARIANCE), atol=1e-3, rtol=1e-3
    )


def test_filters_come_in_both_signs_and_begin_with_the_coarsest_patterns(images):
    model = first_convolution(32, kernel_size=3, padding=1)
    whiten_first_convolution(model, [images])
    weight = model.conv1.weight.detach()
    assert torch.equal(weight[16:], -weight[:16])
    norms = weight[:16].flatten(1).norm(dim=1)
    assert torch.equal(norms, norms.sort().values), "a large variance is divided by a large root"
    assert not model.conv1.bias.any()


def test_filters_that_are_left_over_keep_their_weights(images):
    model = first_convolution(30, kernel_size=2, bias=False)
    before = model.conv1.weight.detach().clone()
    whiten_first_convolution(model, [images])
    assert torch.equal(model.conv1.weight[24:], before[24:])
    assert not torch.equal(model.conv1.weight[:24], before[:24])


def test_only_the_filters_are_frozen():
    with torch.device("meta"):
        model = build_model("resnet8_fast", num_classes=2, stem="cifar")
    assert freeze_first_convolution(model) == 1
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["conv1.weight"]


def test_what_finds_nothing_to_change_warns():
    with pytest.warns(UserWarning, match="whitening: .* nothing changed"):
        assert freeze_first_convolution(nn.Linear(2, 2)) == 0
    with pytest.warns(UserWarning, match="norm_momentum: .* nothing changed"):
        assert set_norm_momentum(nn.Linear(2, 2), 0.5) == 0
    with pytest.warns(UserWarning, match="freeze_norm_scales: .* nothing changed"):
        assert freeze_norm_scales(nn.Linear(2, 2)) == 0


def test_norms_take_a_momentum_and_keep_their_scales():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))
    assert set_norm_momentum(model, 0.5) == 2
    assert freeze_norm_scales(model) == 1
    model(torch.ones(2, 4, 2, 2)).sum().backward()
    torch.testing.assert_close(model[0].running_mean, torch.full((4,), 0.5))
    assert model[0].weight.grad is None and model[0].bias.grad is not None
