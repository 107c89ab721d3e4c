"""Twenty steps with each switch that should not change results, against a plain PyTorch loop."""

import copy
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training_framework.config import TrainConfig
from training_framework.kernels.compiler import find_compiler
from training_framework.models import resnet
from training_framework.plan import PlannedRun, plan_run
from training_framework.training.cuda_graph import CudaGraphStep
from training_framework.training.loaders import Loaders
from training_framework.training.network_assembly import assemble_network
from training_framework.training.parts import build_step

STEPS = 20
LR = 0.002
CPU = torch.device("cpu")
# A quarter of the usual width, an eighth of the time.
CHANNELS = (16, 32, 64, 128)
# Residual blocks that start as the identity, and a low rate: otherwise ReLU and batch norm amplify
# rounding within a few steps, in PyTorch's own loops as in these.
BASE: dict[str, Any] = {
    "data": "digits",  # stored images: synthetic ones are computed on the device, without workers
    "limit_train_images": 160,
    "img_size": 16,
    "model": "resnet10",
    "stem": "cifar",
    "zero_init_last_norm": True,
    "batch_size": 8,
    "lr": LR,
    "scheduler": "constant",
    "decay_norm_and_bias": True,
    "accelerator": "cpu",
    "precision": "32",
}
OFF = {
    "channels_last": False,
    "compile": False,
    "fused_optimizer": False,
    "small_map_convolutions": False,
    "winograd_convolutions": False,
    "fused_norms": False,
    "resident_data": False,
    "num_workers": 0,
    "flip": "none",
    "crop_padding": 0,
}
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


def train(settings: dict[str, Any]) -> tuple[Tensor, nn.Module]:
    """Losses of the steps, and the network after them, with the parts of a run."""
    config = TrainConfig(**{**BASE, **OFF, **settings})
    planned = plan_run(config)
    assert settings.items() <= planned.plan.switch_values().items()
    torch.manual_seed(0)
    model, _ = assemble_network(planned.plan, CPU)
    step = build_step(planned.plan, model, CPU)
    losses = []
    for number, (images, labels) in enumerate(batches(planned)):
        losses.append(step.accumulate(images, labels))
        step.update(LR, step=number)
    return torch.stack(losses), model


def batches(planned: PlannedRun) -> Iterator[tuple[Tensor, Tensor]]:
    loaders = Loaders.build(planned, CPU)
    try:
        for number, batch in zip(range(STEPS), loaders.train.epoch(0), strict=True):
            images, labels, _ = loaders.train_transform(batch, step=number, epoch=0)
            yield images, labels
    finally:
        loaders.close()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def plain_loop(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same by hand: losses, and the weights before and after."""
    planned = plan_run(TrainConfig(**{**BASE, **OFF}))
    plan = planned.plan
    torch.manual_seed(0)
    model = copy.deepcopy(assemble_network(plan, CPU)[0])
    before = flat(model)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LR, momentum=0.9, weight_decay=plan.weight_decay, nesterov=True
    )
    losses = []
    for images, labels in batches(planned):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=plan.label_smoothing)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), before, flat(model)


@pytest.fixture(scope="module", autouse=True)
def _narrow_network() -> Iterator[None]:
    with mock.patch.object(resnet, "STAGE_CHANNELS", CHANNELS):
        yield


@pytest.fixture(scope="module")
def plain() -> tuple[Tensor, Tensor, Tensor]:
    return plain_loop(torch.float32)


def check(
    settings: dict[str, Any], expected: tuple[Tensor, Tensor, Tensor], *, tolerance: float
) -> None:
    losses, model = train(settings)
    assert losses[0] > 2, "the first loss of ten classes"
    torch.testing.assert_close(losses, expected[0], rtol=tolerance, atol=0)
    _, before, after = expected
    # As a whole: a ReLU near its kink may go the other way, which moves single weights by more.
    assert (flat(model) - after).norm() <= 20 * tolerance * (after - before).norm()


SWITCHES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "channels_last": {"channels_last": True},
    "fused_optimizer": {"fused_optimizer": True},
    "small_map_convolutions": {"small_map_convolutions": True},
    "resident_data": {"resident_data": True},
    "num_workers": {"num_workers": 1},
    "activation_checkpointing": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_gives_what_a_plain_loop_gives(switch, plain):
    check(SWITCHES[switch], plain, tolerance=5e-4)


@needs_compiler
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("switches", [("winograd_convolutions",), ("fused_norms",),
                                      ("winograd_convolutions", "fused_norms")])  # fmt: skip
def test_kernels_compiled_here_give_what_a_plain_loop_gives(switches, channels_last, plain):
    settings = {"channels_last": channels_last, **dict.fromkeys(switches, True)}
    check(settings, plain, tolerance=5e-4)


def test_all_of_them_together_give_what_a_plain_loop_gives(plain):
    settings = {key: value for switch in SWITCHES.values() for key, value in switch.items()}
    native = dict.fromkeys(("winograd_convolutions", "fused_norms"), find_compiler() is not None)
    check({**settings, **native, "resident_data": True, "num_workers": 0}, plain, tolerance=5e-4)


def test_bf16_gives_what_a_plain_loop_in_bf16_gives():
    expected = plain_loop(torch.bfloat16)
    # Eight bits of mantissa: 0.4% for one operation.
    check({"precision": "bf16-mixed", "channels_last": True}, expected, tolerance=2e-2)


@pytest.mark.parametrize("settings", [{}, {"channels_last": True, "share_early_weights": True}])
def test_weights_cast_together_give_the_bits_of_autocast(settings, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "STEPS", 4)
    monkeypatch.setitem(BASE, "limit_train_images", 32)
    settings = {**settings, "precision": "bf16-mixed"}
    losses, model = train(settings)
    together, same = train({**settings, "master_weights": True})
    assert torch.equal(together, losses)
    assert torch.equal(flat(same), flat(model))
    assert all(parameter.grad is None for parameter in same.parameters())
    assert {parameter.dtype for parameter in same.parameters()} == {torch.float32}


def test_a_recorded_step_is_the_step_that_is_planned():
    """On a CPU there is nothing to record; that replays equal steps is tests/test_cuda_graph.py."""
    config = TrainConfig(**{**BASE, **OFF, "cuda_graph": True})
    plan = plan_run(config).plan
    model, _ = assemble_network(plan, CPU)
    assert not plan.cuda_graph
    assert not isinstance(build_step(plan, model, CPU), CudaGraphStep)
