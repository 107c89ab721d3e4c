"""Faults in the middle of a training: what is said, what is saved, and how it goes on."""

import csv
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from training_framework.checkpoint import load_checkpoint
from training_framework.config import TrainConfig
from training_framework.errors import UserError
from training_framework.faults import fault_injector
from training_framework.train import EfficientResNet18Trainer, main
from training_framework.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("narrow_networks")

TINY = {
    "data": "synthetic", "model": "resnet10", "img_size": 8, "num_classes": 4,
    "synthetic_train_images": 32, "synthetic_val_images": 12, "batch_size": 8, "epochs": 2,
    "lr": 0.05, "log_every_n_steps": 1, "tensorboard": False, "threads": 1,
}  # fmt: skip
LAST = "checkpoints/last.ckpt"


def samples(count: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 4, 4, generator=generator), torch.arange(count) % 3


class Network(nn.Module):
    """A norm, a dropout and a layer, with a hook at the forward pass.

    Args:
        hook: Called with the images of every forward pass in training, and their scores.
    """

    def __init__(self, hook: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.2)
        self.layer = nn.Linear(48, 3)
        self._hook = hook

    def forward(self, images: Tensor) -> Tensor:
        scores = self.layer(self.dropout(self.norm(images)).flatten(1))
        return scores if self._hook is None or not self.training else self._hook(images, scores)


def train(
    network: nn.Module, images: Tensor, labels: Tensor, val: Any = None, **settings: Any
) -> Any:
    settings = {
        "epochs": 2, "lr": 0.1, "num_classes": 3, "threads": 1, "channels_last": False,
        "tensorboard": False, "log_every_n_steps": 100, "name": "run", "compile": False,
        "save_every_n_steps": 1, **settings,
    }  # fmt: skip
    trainer = EfficientResNet18Trainer(TrainConfig(**settings), network=network)
    # Hooks count the passes of the training, without the one that tries the network before it.
    with mock.patch("training_framework.train.try_user_network"):
        return trainer.train(DataLoader(TensorDataset(images, labels), batch_size=8), val)


def last(name: str = "run") -> dict[str, Any]:
    return load_checkpoint(Path("logs") / name / "version_0" / LAST)


def rows(folder: Path = Path("logs/run/version_0")) -> list[dict[str, str]]:
    """Without the columns that say how fast it went and on what."""
    measured = ("images_per_second", "data_wait", "memory", "mfu", "eval_seconds")
    with (folder / "metrics.csv").open() as file:
        return [
            {key: value for key, value in row.items() if key not in measured}
            for row in csv.DictReader(file)
        ]


def all_finite(state: Any) -> bool:
    if isinstance(state, Tensor):
        return bool(state.isfinite().all())
    if isinstance(state, dict):
        return all(map(all_finite, state.values()))
    return True


class Poison(torch.autograd.Function):
    """Passes scores on, and NaN back."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return scores.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.full_like(gradient, math.nan)


def test_a_sample_that_is_nan_is_named_and_the_checkpoints_are_from_before_it(in_tmp_path):
    images, labels = samples()
    images[21, 1, 2, 3] = math.nan
    with pytest.raises(UserError, match=r"NaN or inf, at step 3, batch 2 of epoch 0: samples 21;"):
        train(Network(), images, labels)
    state = last()
    assert state["progress"]["step"] == 2
    assert all_finite(state["model"]) and all_finite(state["optimizer"])


@pytest.mark.parametrize("log_every_n_steps", [1, 100])
def test_a_gradient_that_is_nan_is_named_and_never_saved(in_tmp_path, log_every_n_steps):
    passes = 0

    def hook(images: Tensor, scores: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return Poison.apply(scores) if passes == 3 else scores

    named = "the gradient became nan" if log_every_n_steps == 1 else r"\S+ became nan"
    where = rf"{named} at step 3, batch 2 of epoch 0: samples 16, 17, .*, 23; lower lr"
    with pytest.raises(UserError, match=where):
        train(Network(hook), *samples(), log_every_n_steps=log_every_n_steps)
    assert last()["progress"]["step"] == 2
    assert all_finite(last()["model"])
    assert len(rows()) == (2 if log_every_n_steps == 1 else 0)


def test_statistics_of_a_norm_that_overflow_are_named_and_never_saved(in_tmp_path):
    network = Network()

    def hook(images: Tensor, scores: Tensor) -> Tensor:
        if network.norm.num_batches_tracked == 2:
            network.norm.running_var.data[1] = math.inf
        return scores

    network._hook = hook
    with pytest.raises(UserError, match=r"norm\.running_var became inf at step 2"):
        train(network, *samples())
    assert last()["progress"]["step"] == 1
    assert all_finite(last()["model"])


def test_a_first_bad_step_far_before_the_row_is_named(in_tmp_path):
    passes = 0

    def hook(images: Tensor, scores: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return scores * (math.inf if passes == 2 else 1)

    with pytest.raises(UserError, match=r"training loss became nan at step 2, batch 1 of epoch 0"):
        train(Network(hook), *samples(), save_every_n_steps=None)
    assert not Path("logs/run/version_0", LAST).exists()
    assert rows() == []


def test_weights_whose_validation_loss_is_nan_are_not_among_the_best(in_tmp_path, capsys):
    images, labels = samples()
    bad = images.clone()
    bad[0] = math.nan
    result = train(Network(), images, labels, DataLoader(TensorDataset(bad, labels), batch_size=8))
    assert result.best_acc1 is None
    assert result.steps == 8
    assert "note: the validation loss is nan at step 4" in capsys.readouterr().err
    names = {path.name for path in (result.run_directory / "checkpoints").glob("*val_acc1*")}
    assert names == set()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that nothing happens to."""
    return main(**TINY, output_dir=tmp_path_factory.mktemp("straight"))


@pytest.mark.parametrize(("point", "first_rows"), [("before_row", 2), ("after_row", 3)])
def test_a_log_that_cannot_be_written_loses_no_step_and_no_row(
    in_tmp_path, monkeypatch, straight, point, first_rows
):
    inject = fault_injector(f"logging.{point}:3:ENOSPC")
    monkeypatch.setattr("training_framework.loggers.csv.fault_point", inject)
    with pytest.raises(UserError, match=r"metrics\.csv: cannot be written to \(No space left"):
        main(**TINY, name="run")
    assert len(rows()) == first_rows
    assert last()["progress"]["step"] == 3
    goes_on_as(straight)


@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_run_that_is_stopped_in_an_evaluation_makes_it_when_it_goes_on(
    in_tmp_path, monkeypatch, straight, evaluation
):
    inject = fault_injector(f"evaluation.batch:{evaluation}:term")
    monkeypatch.setattr("training_framework.training.evaluation.fault_point", inject)
    stopped = main(**TINY, name="run")
    assert (stopped.stopped_by, stopped.steps) == ("SIGTERM", 4 * evaluation)
    assert len(rows()) == 4 * evaluation - 1
    assert last()["progress"]["unlogged"]["train/loss"] > 0
    goes_on_as(straight)


def test_a_clock_that_jumps_changes_no_duration_and_no_result(in_tmp_path, monkeypatch, straight):
    now = time.time()
    jumps = iter(range(10**6))
    for module, name, unit in ((time, "time", 1), (time, "time_ns", 10**9)):
        # To and fro by ten years.
        monkeypatch.setattr(
            module, name, lambda unit=unit: (now + 3e8 * (-1) ** next(jumps)) * unit // 1
        )
    result = main(**TINY, name="run")
    assert 0 < sum(result.epoch_seconds) < 600
    assert rows() == rows(straight.run_directory)
    record = json.loads((result.run_directory / "run.json").read_text())
    assert 0 < record["seconds"] < 600


def goes_on_as(straight: Any) -> None:
    """Resume `run`, which must end as the run that nothing happened to."""
    result = main(resume=Path("logs/run/version_0", LAST))
    assert result.run_directory.name == "version_0"
    assert (result.steps, result.stopped_by) == (straight.steps, "")
    assert (result.best_acc1, result.val_loss) == (straight.best_acc1, straight.val_loss)
    assert rows() == rows(straight.run_directory)
    ours = load_file(result.run_directory / "weights.safetensors")
    theirs = load_file(straight.run_directory / "weights.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    names = [
        sorted(path.name for path in (run.run_directory / "checkpoints").glob("*val_acc1*"))
        for run in (result, straight)
    ]
    assert names[0] == names[1]


class Hanging:
    """Batches of which one never comes; the signal comes while it is waited for."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.dataset = TensorDataset(*samples())

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        images, labels = samples()
        for number in range(4):
            if number == self.batches:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            yield images[8 * number :][:8], labels[8 * number :][:8]


# The first batch is looked at before the run begins, when there is nothing to save yet.
@pytest.mark.parametrize("batches", [1, 2])
def test_a_signal_ends_the_wait_for_a_loader_that_hangs(in_tmp_path, batches):
    trainer = EfficientResNet18Trainer(
        epochs=1, lr=0.1, num_classes=3, threads=1, tensorboard=False, network=Network(),
        channels_last=False, name="run",
    )  # fmt: skip
    start = time.monotonic()
    result = trainer.train(Hanging(batches))
    assert time.monotonic() - start < 30
    assert (result.stopped_by, result.steps) == ("SIGTERM", batches)
    assert last()["progress"]["step"] == batches


def out_of_memory(images: int, from_pass: int = 1) -> Callable[[Tensor, Tensor], Tensor]:
    """A hook of a network for which so many images are too many, once memory is short."""
    passes = 0

    def hook(batch: Tensor, scores: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if passes >= from_pass and len(batch) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
        return scores

    return hook


def test_without_memory_a_run_ends_with_what_to_lower(in_tmp_path):
    message = (
        r"memory is full in step 1 with 8 images at once: CUDA out of memory. Tried to allocate "
        r"2.00 GiB.*lower batch_size.*auto_micro_batch.*memory-efficient"
    )
    with pytest.raises(UserError, match=message):
        train(Network(out_of_memory(4)), *samples())


def test_one_image_that_is_too_much_ends_a_run_with_micro_batches_too(in_tmp_path, capsys):
    with pytest.raises(UserError, match="memory is full in step 1 with 1 images at once"):
        train(Network(out_of_memory(0)), *samples(), auto_micro_batch=True)
    notes = re.findall(r"note: memory is full.*parts of at most (\d)", capsys.readouterr().err)
    assert notes == ["4", "2", "1"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_short_of_memory_goes_on_from_its_last_step_in_smaller_parts(
    in_tmp_path, capsys, monkeypatch, accumulate
):
    """As a run does that knew beforehand from which step on to take smaller parts."""
    settings = {"accumulate_grad_batches": accumulate, "auto_micro_batch": True}
    # Memory gets short in the last batch of the second step.
    network = Network(out_of_memory(3, from_pass=2 * accumulate))
    surprised = train(network, *samples(), **settings)
    err = capsys.readouterr().err
    assert (
        "in step 2 with 8 images at once; from now on each batch is computed in parts of at most 4"
        in err
    )
    assert (
        "in step 2 with 4 images at once; from now on each batch is computed in parts of at most 2"
        in err
    )

    make_step = Trainer._make_step

    def knowing(self: Any, *arguments: Any, **options: Any) -> None:
        if self.progress.step == 1:
            self._parts.step.micro_batch_size = 2
        make_step(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "_make_step", knowing)
    warned = Network()
    knew = train(warned, *samples(), **settings, name="knew")
    assert knew.steps == surprised.steps == 8 // accumulate
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, warned.state_dict()[name]), name
    assert rows() == rows(knew.run_directory)


def test_a_resumed_run_keeps_its_smaller_parts(in_tmp_path):
    images, labels = samples()
    straight = Network(out_of_memory(4))
    train(straight, images, labels, auto_micro_batch=True, name="straight")
    train(Network(out_of_memory(4)), images, labels, auto_micro_batch=True, stop_after_steps=3)
    assert last()["progress"]["micro_batch_size"] == 4
    # There is room again, and still the parts stay what they were.
    resumed = Network()
    train(resumed, images, labels, auto_micro_batch=True, resume=Path("logs/run/version_0", LAST))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_another_error_in_a_step_is_not_taken_for_a_lack_of_memory(in_tmp_path):
    def hook(images: Tensor, scores: Tensor) -> Tensor:
        raise RuntimeError("a bug of the network")

    with pytest.raises(RuntimeError, match="a bug of the network"):
        train(Network(hook), *samples(), auto_micro_batch=True)


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.0, r"step 2 has a batch of 1 image.*one value per channel.*drop_last"),
        (0.1, r"step 1 trains on one image of its batch of 8.*raise train_on_hardest"),
    ],
)
def test_one_image_that_batch_norm_refuses_is_one_line(in_tmp_path, share, message):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    loader = DataLoader(TensorDataset(torch.randn(9, 3, 8, 8), torch.arange(9) % 2), batch_size=8)
    config = TrainConfig(epochs=1, lr=0.01, tensorboard=False, threads=1, train_on_hardest=share)
    with pytest.raises(UserError, match=message):
        EfficientResNet18Trainer(config, network=network).train(loader)
