"""What a resumed step takes over."""

import copy

import pytest
import torch
from torch import nn

from training_framework.training.step import TrainStep

CHANNELS_LAST = {"memory_format": torch.channels_last}


def step_of(network: nn.Module, kind: type[torch.optim.Optimizer]) -> TrainStep:
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(network.parameters(), lr=0.1, fused=True, **options)
    return TrainStep(network, optimizer, device_type="cpu")


def make_steps(step: TrainStep, first: int) -> None:
    generator = torch.Generator().manual_seed(first)
    for number in range(first, first + 2):
        images = torch.randn(4, 3, 4, 4, generator=generator)
        step.accumulate(images, torch.arange(4))
        step.update(0.1, step=number)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("was_channels_last", [False, True])
def test_the_optimizers_state_takes_the_memory_layout_of_the_weights(kind, was_channels_last):
    """A fused kernel of CUDA reads both in the same order, or refuses."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    now = copy.deepcopy(first)
    (first if was_channels_last else now).to(**CHANNELS_LAST)
    before, after = step_of(first, kind), step_of(now, kind)
    make_steps(before, 0)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    kept = 0
    for parameter, other in zip(now.parameters(), first.parameters(), strict=True):
        for key, value in after.optimizer.state[parameter].items():
            assert torch.equal(value, before.optimizer.state[other][key])
            if key != "step":
                assert value.stride() == parameter.stride()
                kept += 1
    assert kept == 4 * (1 if kind is torch.optim.SGD else 2)
    for step in (before, after):
        make_steps(step, 2)
    for parameter, other in zip(now.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-5)
