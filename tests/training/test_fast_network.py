"""The parts of a run with the methods of short trainings: whitening, muon, lookahead, rates."""

import copy
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from training_framework.config import TrainConfig
from training_framework.models import save_weights
from training_framework.optimizers import Lookahead, Muon
from training_framework.plan import plan_run
from training_framework.training.parts import build_parts

SETTINGS = {
    "data": "synthetic", "synthetic_train_images": 16, "synthetic_val_images": 8, "img_size": 8,
    "batch_size": 8, "epochs": 4, "model": "resnet8_fast", "optimizer": "muon",
    "bias_lr_factor": 4.0, "whitening_bias_epochs": 2.0, "lookahead_steps": 3, "threads": 1,
    "num_workers": 0, "precision": "32", "accelerator": "cpu",
    "winograd_convolutions": False, "fused_norms": False,
}  # fmt: skip


def parts_of(*, with_weights=True, **settings):
    return build_parts(plan_run(TrainConfig(**{**SETTINGS, **settings})), with_weights=with_weights)


def train(parts, first, last):
    parts.model.train()
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(8, 3, 8, 8, generator=generator)
        parts.step.accumulate(images, torch.arange(8) % 4)
        parts.step.update(parts.plan.lr * parts.schedule(step), step=step)


@pytest.fixture(scope="module")
def parts():
    return parts_of()


def test_the_plan_takes_what_the_model_has_by_itself(parts):
    plan = parts.plan
    assert plan.whitening and plan.dirac_init and plan.freeze_norm_scales
    assert (plan.norm_momentum, plan.activation, plan.whitening_bias_steps) == (0.4, "gelu", 4)
    assert (plan.lr, plan.muon_rest_lr, plan.nesterov) == (0.24, 0.1 * 8 / 64, True)
    plain = plan_run(TrainConfig(data="synthetic", accelerator="cpu")).plan
    assert not (plain.whitening or plain.dirac_init or plain.freeze_norm_scales)
    assert plain.norm_momentum is None and plain.activation == "relu"


def test_what_is_frozen_and_how_it_starts(parts):
    frozen = {name for name, p in parts.model.named_parameters() if not p.requires_grad}
    scales = {f"layer{n}.0.bn{m}.weight" for n in (1, 2, 3) for m in (1, 2)}
    assert frozen == {"conv1.weight", *scales}
    weight = parts.model.conv1.weight
    assert torch.equal(weight[16:], -weight[:16]), "the filters are whitening ones"
    assert isinstance(parts.step.optimizer, Muon) and isinstance(parts.step.lookahead, Lookahead)
    norms = [module for module in parts.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 6 and {norm.momentum for norm in norms} == {0.4}


@pytest.mark.parametrize("resume_at", [2, 5])
def test_a_resumed_training_goes_on_bit_for_bit(resume_at):
    """Before and after the whitening's bias is trained, and between two moves of lookahead."""
    whole = parts_of()
    train(whole, 0, resume_at)
    state = copy.deepcopy(whole.step.state_dict())
    train(whole, resume_at, 8)
    resumed = parts_of(with_weights=False, seed=1)
    assert not torch.equal(resumed.model.conv1.weight, whole.model.conv1.weight)
    resumed.step.load_state_dict(state)
    train(resumed, resume_at, 8)
    states = [parts.step.state_dict() for parts in (resumed, whole)]
    for key in ("model", "lookahead"):
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0)
    optimizers = [state["optimizer"]["state"] for state in states]
    torch.testing.assert_close(*optimizers, rtol=0, atol=0)
    assert not whole.model.conv1.bias.requires_grad


def test_loaded_weights_keep_their_filters(tmp_path):
    source = parts_of(whitening=False)
    save_weights(source.model.state_dict(), tmp_path / "w.safetensors", {})
    loaded = parts_of(weights=tmp_path / "w.safetensors", seed=1)
    assert torch.equal(loaded.model.conv1.weight, source.model.conv1.weight)
    assert not loaded.model.conv1.weight.requires_grad
    assert source.model.conv1.weight.requires_grad


def test_pictures_that_are_skipped_have_no_part_in_the_filters(tmp_path):
    generator = np.random.default_rng(0)
    for split, name in itertools.product(("train", "val"), ("ant", "bee")):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    settings = {"data": "folder", "data_root": tmp_path, "on_bad_image": "skip", "batch_size": 4}
    sound = parts_of(**settings)
    (tmp_path / "train/ant/bad.png").write_bytes((tmp_path / "train/ant/0.png").read_bytes()[:80])
    with_bad = parts_of(**settings, seed=1)
    torch.testing.assert_close(with_bad.model.conv1.weight, sound.model.conv1.weight)
    assert not torch.equal(with_bad.model.fc.weight, sound.model.fc.weight)


def test_a_users_own_network_stays_as_it_is():
    plan = plan_run(TrainConfig(**{**SETTINGS, "optimizer": "sgd"}), own_network="Own").plan
    assert (plan.whitening, plan.freeze_norm_scales, plan.norm_momentum) == (False, False, None)
    assert plan.lookahead_steps == 3


def test_a_state_of_another_optimizer_is_refused():
    adam = parts_of(optimizer="adamw", lookahead_steps=0)
    train(adam, 0, 1)
    sgd = parts_of(optimizer="sgd", lookahead_steps=0)
    with pytest.raises(ValueError, match="the state of another optimizer"):
        sgd.step.load_state_dict(adam.step.state_dict())
