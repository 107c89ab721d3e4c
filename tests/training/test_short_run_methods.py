"""Progressive resolution, selection by loss, new norm statistics, part epochs, augmentation."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training_framework.checkpoint import load_checkpoint
from training_framework.config import TrainConfig
from training_framework.data import Batch
from training_framework.data.resolution import Resolutions, resized
from training_framework.measure.verify.difference import compare_runs
from training_framework.models.flops import forward_flops_per_image, training_flops_per_image
from training_framework.plan import plan_run
from training_framework.train import EfficientResNet18Trainer
from training_framework.training.norm_statistics import recompute_norms
from training_framework.training.parts import build_parts, build_step
from training_framework.training.selection import HardestImages, all_images, hardest
from training_framework.training.shape_warmup import warm_up_shapes
from training_framework.training.test_time_augmentation import averaged_logits

LAST = "logs/run/version_0/checkpoints/last.ckpt"
CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "data": "synthetic", "model": "resnet10", "img_size": 12, "num_classes": 4, "batch_size": 8,
    "synthetic_train_images": 32, "synthetic_val_images": 12, "epochs": 2.5, "lr": 0.05,
    "log_every_n_steps": 1, "tensorboard": False, "threads": 1, "precision": "32",
    "winograd_convolutions": False, "fused_norms": False,
}  # fmt: skip
METHODS: dict[str, Any] = {
    "progressive_resolution": ((0.0, 8), (0.5, 12)), "eval_img_size": 16, "tta": "mirror-translate",
    "train_on_hardest": 0.5, "average_from": 0.2, "recompute_norm_batches": 2, "mixup": 0.2,
    "auto_augment": "rand", "color_jitter": 0.2, "scheduler": "trapezoid",
}  # fmt: skip


def parts_of(**settings: Any) -> Any:
    return build_parts(plan_run(TrainConfig(**{**TINY, **settings})))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    )


def run(**settings: Any) -> Any:
    """Train the small network."""
    config = TrainConfig(**{**TINY, **settings})
    return EfficientResNet18Trainer(config, network=network()).train()


def test_a_run_with_all_methods_stops_and_resumes_bit_for_bit(in_tmp_path: Path) -> None:
    straight = run(**METHODS, name="straight")
    assert straight.steps == 10  # 2.5 epochs of 4
    assert load_checkpoint(straight.run_directory / "checkpoints/last.ckpt")["average"]
    for steps in (3, None):  # within an epoch, and to the end, which is within one too
        result = run(**METHODS, name="stopped", stop_after_steps=steps)
    comparison = compare_runs(straight.run_directory, result.run_directory)
    assert not comparison.differences
    assert len(straight.epoch_seconds) == 3
    assert straight.last_acc1_tta is not None


def test_a_run_that_ended_within_an_epoch_goes_on_there(in_tmp_path: Path) -> None:
    assert run(name="run").steps == 10
    longer = run(name="run", epochs=3, allow_config_change=True, resume=Path(LAST))
    assert longer.steps == 12 and len(longer.epoch_seconds) == 3


def test_sizes_begin_with_whole_epochs_and_last_to_the_end() -> None:
    resolutions = Resolutions.of([(0, 96), (0.6, 112), (0.99, 128)], 5)
    assert [resolutions.at(epoch) for epoch in range(5)] == [96, 96, 96, 112, 112]
    assert Resolutions.of([(0, 96), (0.6, 112)], 2.5).by_epoch(2.5) == [
        (1, 96), (1, 96), (0.5, 112),
    ]  # fmt: skip


def test_resizing_is_antialiased_and_leaves_the_same_size_alone() -> None:
    stripes = torch.tensor([0.0, 1.0]).repeat(8).expand(2, 3, 16, 16)
    assert resized(stripes, 16) is stripes
    gray = resized(stripes, 4)
    assert gray.shape == (2, 3, 4, 4) and (gray - 0.5).abs().max() < 0.1


def test_files_are_decoded_at_the_size_of_their_epoch(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (20, 20), (number, 3, 9)).save(
                    tmp_path / split / label / f"{number}.png"
                )
    parts = parts_of(
        data="folder", data_root=tmp_path, num_classes=2, batch_size=2, num_workers=0, epochs=4,
        progressive_resolution=((0.0, 8), (0.5, 12)), eval_img_size=16,
    )  # fmt: skip
    seen = [next(iter(parts.loaders.train.epoch(epoch))).images.shape[-1] for epoch in range(4)]
    assert seen == [8, 8, 12, 12]
    assert next(iter(parts.loaders.val.epoch(0))).images.shape[-1] == 16


def test_arrays_are_resized_on_the_device_and_flops_follow() -> None:
    parts = parts_of(progressive_resolution=((0.0, 8), (0.5, 12)), epochs=3, eval_img_size=16)
    batch = next(iter(parts.loaders.train.epoch(0)))
    sizes = [
        parts.loaders.train_transform(batch, step=0, epoch=epoch)[0].shape[-1] for epoch in range(3)
    ]
    assert sizes == [8, 8, 12]
    assert parts.loaders.eval_transform(batch)[0].shape[-1] == 16
    small, large = (training_flops_per_image(parts.model, size) for size in (8, 12))
    assert [parts.flops_in(epoch) for epoch in range(3)] == [small, small, large]
    assert parts.flops_per_image == pytest.approx((2 * small + large) / 3)


@pytest.mark.parametrize("mixed", [False, True])
def test_the_images_with_the_largest_loss_are_trained_on(mixed: bool) -> None:
    parts = parts_of(train_on_hardest=0.25)
    assert parts.flops_per_image == forward_flops_per_image(parts.model, 12) + 0.25 * (
        training_flops_per_image(parts.model, 12)
    )
    images = torch.rand(8, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    labels, others = torch.arange(8) % 4, (torch.arange(8) + 1) % 4
    pair = (others, torch.tensor(0.3)) if mixed else None
    before = {key: value.clone() for key, value in parts.model.state_dict().items()}
    chosen, chosen_labels, chosen_pair = parts.select(images, labels, pair)
    with torch.no_grad():
        logs = parts.model.eval()(images).log_softmax(1)
    losses = -logs[torch.arange(8), labels]
    if mixed:
        losses = 0.3 * losses - 0.7 * logs[torch.arange(8), others]
    best = losses.topk(2).indices.sort().values
    assert torch.equal(chosen, images[best]) and torch.equal(chosen_labels, labels[best])
    assert chosen.is_contiguous(memory_format=torch.channels_last)
    if mixed:
        assert torch.equal(chosen_pair[0], others[best])
    # Looking at a batch changes no statistics.
    after = parts.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_at_least_one_image_is_chosen_and_ties_go_to_the_first() -> None:
    assert hardest(torch.tensor([1.0, 3.0, 3.0, 2.0]), 0.01).tolist() == [1]
    assert hardest(torch.tensor([1.0, 3.0, 3.0, 2.0]), 0.75).tolist() == [1, 2, 3]


def test_selection_is_off_unless_asked_for() -> None:
    assert parts_of().select is all_images
    assert isinstance(parts_of(train_on_hardest=0.5).select, HardestImages)


def test_every_rank_chooses_by_the_statistics_of_a_checkpoint(monkeypatch):
    parts = parts_of(train_on_hardest=0.5)
    labels = torch.arange(8) % 4

    def as_rank_0(network: Any) -> None:
        """Stands for other buffers: scores that fit the first two classes only."""
        with torch.no_grad():
            network.fc.bias[:2] = 1000

    monkeypatch.setattr("training_framework.training.selection.share_buffers", as_rank_0)
    _, chosen, _ = parts.select(torch.rand(8, 3, 12, 12), labels, None)
    assert chosen.tolist() == [2, 3, 2, 3]


class Batches:
    """A loader of three fixed batches."""

    batch_count = 3

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = [torch.randn(6, 3, 5, 5, generator=generator) + k for k in range(3)]

    def epoch(self, epoch: int, start_batch: int = 0) -> Any:
        for images in self.images[start_batch:]:
            yield Batch(images, torch.zeros(6, dtype=torch.int64), torch.arange(6))

    def close(self) -> None:
        """Nothing is open."""


def test_recomputed_statistics_are_the_mean_of_the_batches() -> None:
    model, loader = network().eval(), Batches()
    norm, convolution = model[1], model[0]
    norm.running_mean.fill_(9.0)  # forgotten
    momentum = norm.momentum
    recompute_norms(
        model,
        loader,  # type: ignore[arg-type]
        lambda batch, step, epoch: (batch.images, batch.labels, None),
        batches=2,
        epoch=0,
        device_type="cpu",
        precision="32",
    )
    with torch.no_grad():
        maps = [convolution(images) for images in loader.images[:2]]
    torch.testing.assert_close(norm.running_mean, sum(m.mean((0, 2, 3)) for m in maps) / 2)
    torch.testing.assert_close(norm.running_var, sum(m.var((0, 2, 3)) for m in maps) / 2)
    assert norm.momentum == momentum
    assert not model.training and not norm.training


def test_an_average_is_evaluated_with_statistics_of_its_own(in_tmp_path: Path) -> None:
    states = []
    for batches in (0, 4):
        result = run(ema_decay=0.9, epochs=1, recompute_norm_batches=batches, name=f"n{batches}")
        states.append(load_checkpoint(result.run_directory / "checkpoints" / "last.ckpt"))
    for key, value in states[0]["model"].items():  # the training itself is the same
        assert torch.equal(states[1]["model"][key], value)
    averages = [state["average"] for state in states]
    differ = {key for key in averages[0] if not torch.equal(averages[0][key], averages[1][key])}
    assert differ and all("running_" in key or "num_batches" in key for key in differ)


def test_views_are_weighted_as_airbench_weights_them() -> None:
    class Position(nn.Module):
        """Two scores: the upper left pixel, and the one to the right of it."""

        def forward(self, images: Tensor) -> Tensor:
            return images[:, 0, 0, :2]

    images = torch.arange(16.0).view(1, 1, 4, 4)
    model = Position()
    logits = model(images)
    mirrored = averaged_logits(model, images, logits, "mirror")
    assert mirrored.tolist() == [[1.5, 1.5]]  # 0, 1 and, mirrored, 3, 2
    # Down and right by one: the reflection of pixel 5 stands in the corner, and 4 beside it;
    # mirrored, pixel 6 and 5. Up and left: 5, 6 and, mirrored, the reflected 6 and 7.
    shifted = (torch.tensor([5.0, 4.0]) + torch.tensor([6.0, 5.0])) / 2
    other = (torch.tensor([5.0, 6.0]) + torch.tensor([6.0, 7.0])) / 2
    expected = 0.5 * mirrored[0] + 0.25 * (shifted + other)
    views = averaged_logits(model, images, logits, "mirror-translate")
    torch.testing.assert_close(views[0], expected)


def test_every_shape_is_warmed_up_and_nothing_changes() -> None:
    plan = plan_run(
        TrainConfig(**TINY, progressive_resolution=((0.0, 8), (0.5, 12)), mixup=0.2)
    ).plan
    sizes: list[torch.Size] = []
    model = network()
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step = build_step(plan, model, CPU)
    assert warm_up_shapes(step, plan, CPU) == 0  # a CPU computes every shape like any other
    compiled = dataclasses.replace(plan, compile=True)
    assert warm_up_shapes(step, compiled, CPU) == 2
    assert sizes == [(8, 3, 8, 8), (8, 3, 12, 12)]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert step.sums is not None and step.sums.read().count == 0
