"""Times one variant's whole training runs: epochs, and the time to an accuracy."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from training_framework.config import TrainConfig
from training_framework.machine.load import MachineWatch
from training_framework.machine.memory import peak_memory
from training_framework.measure.compare.result import Measurement, VariantFacts
from training_framework.runs.progress import TrainResult
from training_framework.training.run import TrainingRun

__all__ = ["CLOCK", "RunSampler"]

CLOCK = (
    "whole epochs of training: steps, logging, evaluation, and compilation where it is on; "
    "without opening the data, building the network, and saving after an epoch"
)


class RunSampler:
    """A variant whose samples are whole training runs, from the first step to the last.

    The runs write to a temporary folder.

    Args:
        config: What to train.
        seeds: Seeds of the rounds; empty: the configuration's seed and the numbers after it.
        warmup_steps: Steps of a first run, which does not count.

    Attributes:
        facts: What was built, and how it warmed up.

    Raises:
        UserError: A setting is wrong or cannot be used on this machine.
    """

    def __init__(self, config: TrainConfig, *, seeds: tuple[int, ...], warmup_steps: int) -> None:
        self._config = config
        self._seeds = seeds
        self._watch = MachineWatch()
        with tempfile.TemporaryDirectory(prefix="efficient-resnet-") as folder:
            started = time.perf_counter()
            run = TrainingRun(self._config_of(config.seed, folder, stop_after_steps=warmup_steps))
            build_seconds = time.perf_counter() - started
            result = run.execute()
            record = _record_of(result)
        plan, facts = run.plan, run.planned.facts
        self.device = plan.torch_device(run.planned.processes.local_rank)
        seconds_per_step = plan.images_per_step / result.images_per_second
        self.facts = VariantFacts(
            device=plan.device,
            device_name=plan.device_name,
            dataset=facts.name,
            train_images=facts.train_images,
            image_size=plan.image_size,
            images_per_step=plan.images_per_step,
            flops_per_image=record["training_flops_per_image"],
            peak_flops=record["peak_flops"],
            peak_flops_source=record["peak_flops_source"],
            plan=plan.as_dict(),
            build_seconds=build_seconds,
            warmup_step_seconds=[seconds_per_step] * result.steps,
        )

    def sample(self, round_number: int) -> Measurement:
        """Train from start to end."""
        seed = self._config.seed + round_number
        if self._seeds:
            seed = self._seeds[round_number % len(self._seeds)]
        with tempfile.TemporaryDirectory(prefix="efficient-resnet-") as folder:
            run = TrainingRun(self._config_of(seed, folder))
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            self._watch.start()
            result = run.execute()
            load = self._watch.stop()
            record = _record_of(result)
        if result.stopped_by:  # a run in this process hears the signals itself
            raise KeyboardInterrupt(result.stopped_by)
        return Measurement(
            round=round_number,
            seconds=sum(result.epoch_seconds),
            steps=result.steps,
            images=run.plan.total_batches * run.plan.global_batch_size,
            cpu_seconds=load.cpu_seconds,
            other_cpu_share=load.other_cpu_share,
            peak_memory_bytes=peak_memory(self.device),
            seed=seed,
            acc1=result.last_acc1,
            curve=_curve(record),
            epoch_seconds=list(result.epoch_seconds),
        )

    def close(self) -> None:
        """No-op: nothing stays open between runs."""

    def _config_of(
        self, seed: int, folder: str, *, stop_after_steps: int | None = None
    ) -> TrainConfig:
        return self._config.model_copy(
            update={
                "seed": seed,
                "stop_after_steps": stop_after_steps,
                "resume": "never",
                "tensorboard": False,
                "save_top_k": 0,
                "output_dir": Path(folder),
            }
        )


def _record_of(result: TrainResult) -> dict[str, Any]:
    """The run's run.json."""
    assert result.run_directory is not None
    text = (result.run_directory / "run.json").read_text(encoding="utf-8")
    record: dict[str, Any] = json.loads(text)
    return record


def _curve(record: dict[str, Any]) -> list[tuple[float, float]]:
    """A run's accuracy against the seconds since its start."""
    curve, seconds = [], 0.0
    for epoch in record["epochs"]:
        seconds += epoch["seconds"]
        if epoch["val_acc1"] is not None:
            curve.append((seconds, epoch["val_acc1"]))
    return curve
