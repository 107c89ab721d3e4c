import pytest
import torch
from torch import nn

from training_framework.training.master_weights import MasterWeights


class Partly(nn.Module):
    """With a layer that is not used, and one that does not learn."""

    def __init__(self):
        super().__init__()
        self.used, self.frozen, self.unused = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, inputs):
        return self.frozen(self.used(inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_the_bits_of_autocast_and_weights_without_one_have_none(dtype):
    torch.manual_seed(0)
    model, inputs = Partly(), torch.randn(5, 4)
    found = []
    for network in (model, MasterWeights(model, dtype)):
        with torch.autocast("cpu", dtype):
            output = network(inputs)
        for _ in range(2):  # gradients of several batches add up in fp32
            output.float().sum().backward(retain_graph=True)
        found.append([output, model.used.weight.grad, model.used.bias.grad])
        assert model.unused.weight.grad is None and model.frozen.weight.grad is None
        model.zero_grad()
    for ours, reference in zip(*found, strict=True):
        assert ours.dtype == reference.dtype
        assert torch.equal(ours, reference)
