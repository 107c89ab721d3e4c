"""The estimate of training's memory, beside what autograd really saves."""

import pytest
import torch

from training_framework.models import build_model
from training_framework.models.memory import training_memory


def saved_bytes(model, images):
    """Bytes that autograd saves in a forward pass, without the network's own tensors."""
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(images, 3, 16, 16))
    return sum(tensor.untyped_storage().nbytes() for at, tensor in saved.items() if at not in own)


@pytest.mark.parametrize("name", ["resnet10", "resnet50"])
def test_the_estimate_is_what_autograd_saves_for_each_image_more(name):
    model = build_model(name, num_classes=10, stem="cifar").train()
    estimate = training_memory(model, 16)
    assert estimate.weight_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    two_more = saved_bytes(model, images=4) - saved_bytes(model, images=2)
    # The estimate counts the statistics of each norm, of which there is one set for all images.
    statistics = 8 * sum(buffer.numel() for buffer in model.buffers() if buffer.dim()) // 2
    assert estimate.activation_bytes - statistics == two_more / 2


def test_building_a_network_without_storage_draws_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with torch.device("meta"):
        build_model("resnet10", num_classes=10, stem="cifar")
    assert torch.equal(torch.rand(1), expected)
