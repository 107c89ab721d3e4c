import math

import pytest
import torch
from torch import nn

from training_framework.data import Batch
from training_framework.errors import UserError
from training_framework.optimizers import build_optimizer
from training_framework.training.finiteness import FinitenessGuard, WatchedBatch
from training_framework.training.step import TrainStep

DEVICE = torch.device("cpu")


class Watch:
    """A step and its guard: tells the guard of losses, as if they came from batches of 4."""

    def __init__(self, optimizer="sgd", precision="32"):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)
        )
        momentum = 0.9 if optimizer == "sgd" else 0.0
        built = build_optimizer(
            network, name=optimizer, lr=0.1, momentum=momentum, weight_decay=0.0
        )
        self.step = TrainStep(network, built, device_type="cpu", precision=precision)
        self.guard = FinitenessGuard(
            self.step, sample_name=lambda index: f"image-{index}", device=DEVICE
        )
        self.made = 0

    def losses(self, *losses, norm=None, images=None):
        """One step; its batches hold samples 10 * step, 10 * step + 1, ..."""
        self.made += 1
        first = 10 * self.made
        if images is None:
            images = torch.zeros(4, 3, 3, 3, dtype=torch.uint8)
        batches = [
            WatchedBatch.of(
                Batch(images, torch.zeros(4, dtype=torch.int64), first + 4 * n + torch.arange(4)),
                torch.tensor(loss),
            )
            for n, loss in enumerate(losses)
        ]
        self.guard.watch(
            batches,
            None if norm is None else torch.tensor(norm),
            step=self.made,
            epoch=0,
            first_batch=len(losses) * (self.made - 1),
        )

    def fault(self, *, weights=True):
        with pytest.raises(UserError) as raised:
            self.guard.check(self.made, weights=weights)
        return str(raised.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_step_whose_loss_is_not_finite_is_named_with_its_samples(bad):
    watch = Watch()
    watch.losses(1.0)
    watch.losses(bad)
    watch.losses(math.nan)
    fault = watch.fault(weights=False)
    assert f"the training loss became {bad} at step 2, batch 1 of epoch 0" in fault
    assert "samples image-20, image-21, image-22, image-23;" in fault


def test_of_a_group_of_batches_the_one_with_the_bad_loss_is_named():
    watch = Watch()
    watch.losses(1.0, math.nan)
    assert "step 1, batch 1 of epoch 0: samples image-14, image-15" in watch.fault()


def test_many_samples_are_cut_short():
    watch = Watch()
    indices = torch.arange(100)
    watch.guard.watch(
        [WatchedBatch(indices, torch.tensor(math.nan), None)], None, step=1, epoch=2, first_batch=5
    )
    assert "batch 5 of epoch 2: samples image-0, " in (fault := watch.fault())
    assert "image-15 and 84 more" in fault and "image-16" not in fault


def test_the_images_that_are_not_finite_are_named_alone():
    watch = Watch()
    images = torch.zeros(4, 3, 3, 3)
    images[2, 1, 0, 0] = math.inf
    watch.losses(math.nan, images=images)
    fault = watch.fault()
    assert "images of the training loader hold NaN or inf, at step 1" in fault
    assert "samples image-12;" in fault


def test_large_but_finite_numbers_are_no_fault():
    watch = Watch()
    watch.losses(3e38)
    watch.losses(3e38)  # their sum overflows
    with torch.no_grad():
        watch.step.model[0].weight[0, 0, 0, 0] = 1e30  # and so does its square
    watch.guard.check(2, weights=True)


def test_the_gradient_is_named_before_the_loss_that_it_spoils():
    watch = Watch()
    watch.losses(1.0, norm=2.0)
    watch.losses(1.0, norm=math.inf)
    watch.losses(math.nan, norm=math.nan)
    fault = watch.fault()
    assert "the gradient became inf at step 2, batch 1 of epoch 0: samples image-20" in fault


def test_a_loss_is_named_before_the_gradient_of_the_same_step():
    watch = Watch()
    watch.losses(math.nan, norm=math.nan)
    assert "the training loss became nan at step 1" in watch.fault()


@pytest.mark.parametrize("name", ["0.weight", "3.bias"])
def test_weights_are_looked_at_when_asked(name):
    watch = Watch()
    watch.losses(1.0)
    with torch.no_grad():
        watch.step.model.get_parameter(name).view(-1)[1] = math.nan
    watch.guard.check(1, weights=False)
    assert f"{name} became nan at step 1, batch 0 of epoch 0: samples image-10" in watch.fault()


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_statistics_of_a_norm_are_looked_at_always(buffer):
    watch = Watch()
    watch.losses(1.0)
    getattr(watch.step.model[1], buffer)[2] = math.inf
    assert f"1.{buffer} became inf at step 1" in watch.fault(weights=False)


def test_a_second_moment_that_overflows_is_found_although_the_weights_stay_finite():
    watch = Watch(optimizer="adamw")
    for parameter in watch.step.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e25)
    watch.step.update(0.1, step=0)
    watch.losses(1.0)
    assert all(parameter.isfinite().all() for parameter in watch.step.model.parameters())
    assert "exp_avg_sq of 0.weight became inf at step 1" in watch.fault()


def test_fp16_gradients_may_overflow_until_the_scale_is_gone():
    watch = Watch(precision="16-mixed")
    watch.losses(1.0, norm=math.inf)
    watch.guard.check(1, weights=True)
    watch.step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-20)
    watch.step.scaler.scale(torch.ones(()))  # which is when it takes its first value
    watch.losses(1.0)
    fault = watch.fault()
    assert "fallen to 1e-06 at step 2" in fault and "bf16-mixed" in fault


def test_what_was_checked_is_let_go():
    watch = Watch()
    for _ in range(3):
        watch.losses(1.0)
    watch.guard.check(3, weights=False)
    assert [watched.step for watched in watch.guard._steps] == [3]


def test_before_the_first_step_there_is_nothing_to_find():
    Watch().guard.check(0, weights=True)
