"""The estimate of training's memory, beside what autograd really saves."""

import pytest
import torch

from training_framework.models import build_model
from training_framework.models.memory import training_memory


@pytest.mark.parametrize("name", ["resnet10", "resnet50"])
def test_the_estimate_is_what_autograd_saves(name):
    model = build_model(name, num_classes=10, stem="cifar")
    estimate = training_memory(model, 16)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    assert estimate.weight_bytes == 4 * sum(p.numel() for p in model.parameters())
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = torch.randn(4, 3, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(images)
    total = sum(
        tensor.untyped_storage().nbytes() for at, tensor in saved.items() if at not in weights
    )
    # Statistics of each norm are the same for any number of images.
    assert estimate.activation_bytes == pytest.approx(total / 4, rel=0.03)


def test_building_a_network_without_storage_draws_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with torch.device("meta"):
        build_model("resnet10", num_classes=10, stem="cifar")
    assert torch.equal(torch.rand(1), expected)
