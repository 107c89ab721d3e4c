import pytest
import torch
from torch import nn

from training_framework.config import TrainConfig
from training_framework.inference import _placed
from training_framework.plan import plan_run


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_network_is_used_in_the_memory_format_of_the_plan(channels_last):
    config = TrainConfig(data="digits", accelerator="cpu", channels_last=channels_last)
    network = _placed(nn.Conv2d(3, 8, 3), plan_run(config).plan, torch.device("cpu"))
    is_last = network.weight.is_contiguous(memory_format=torch.channels_last)
    assert is_last is channels_last
