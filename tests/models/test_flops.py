import pytest
import torch
from torch import nn

from training_framework.models.flops import forward_flops_per_image, training_flops_per_image
from training_framework.models.resnet import build_model
from training_framework.models.surgery import (
    checkpoint_activations,
    use_small_map_convolutions,
)


def test_resnet18_for_cifar_takes_0_556_giga_multiply_adds_forward_and_three_times_that_to_train():
    model = build_model("resnet18", num_classes=10, stem="cifar")
    assert forward_flops_per_image(model, 32) == pytest.approx(2 * 0.556e9, rel=0.01)
    assert training_flops_per_image(model, 32) == pytest.approx(3 * 2 * 0.556e9, rel=0.01)


def test_resnet50_at_224_pixels_takes_4_09_giga_multiply_adds_forward():
    model = build_model("resnet50", num_classes=1000, stem="imagenet")
    assert forward_flops_per_image(model, 224) == pytest.approx(2 * 4.09e9, rel=0.002)


def test_a_multiplication_and_an_addition_count_as_two():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    convolution, linear = 4 * 6 * 6 * 27, 4 * 6 * 6 * 5
    assert forward_flops_per_image(model, 8) == 2 * (convolution + linear)
    # Backward is twice forward, except that nobody needs the gradient of the images.
    assert training_flops_per_image(model, 8) == 2 * (2 * convolution + 3 * linear)


def test_surgery_does_not_change_the_count():
    model = build_model("resnet10", num_classes=10, stem="imagenet")
    before = forward_flops_per_image(model, 32), training_flops_per_image(model, 32)
    use_small_map_convolutions(model, 32)
    checkpoint_activations(model)
    assert (forward_flops_per_image(model, 32), training_flops_per_image(model, 32)) == before


def test_counting_leaves_the_model_alone():
    model = build_model("resnet10", num_classes=10, stem="imagenet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training_flops_per_image(model, 32)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
