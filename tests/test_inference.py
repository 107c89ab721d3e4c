from pathlib import Path

import pytest
import torch
from torch import nn

from training_framework.config import TrainConfig
from training_framework.data import Batch
from training_framework.inference import _evaluation_config, _placed, _transform
from training_framework.plan import plan_run
from training_framework.runs.network_card import NetworkCard


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_network_is_used_in_the_memory_format_of_the_plan(channels_last):
    config = TrainConfig(data="digits", accelerator="cpu", channels_last=channels_last)
    network = _placed(nn.Conv2d(3, 8, 3), plan_run(config).plan, torch.device("cpu"))
    is_last = network.weight.is_contiguous(memory_format=torch.channels_last)
    assert is_last is channels_last


def test_arrays_are_evaluated_at_the_sizes_of_the_training():
    trained = TrainConfig(data="digits", accelerator="cpu", img_size=8, eval_img_size=12)
    planned = plan_run(trained)
    card = NetworkCard.of(planned.plan, planned.facts)
    config = _evaluation_config(Path("weights.safetensors"), card, {"data": "digits"})
    assert (config.img_size, config.eval_img_size) == (8, 12)
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    batch = Batch(pixels, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    images, _ = _transform(card, planned.plan, torch.device("cpu"))(batch)
    assert images.shape == (1, 3, 12, 12)
