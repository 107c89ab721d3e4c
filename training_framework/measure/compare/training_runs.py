"""One variant's whole training runs on the clock: epochs, and the time to an accuracy."""

import json
import tempfile
import time
from pathlib import Path

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
    """A variant of which each sample is a training run of its own, from the first step to the last.

    What the runs write goes to a temporary folder.

    Args:
        config: What to train.
        seeds: Of the rounds; empty: the configuration's and those after it.
        warmup_steps: Steps of a run that is made first and dropped.

    Attributes:
        facts: What was built, and how it warmed up.

    Raises:
        UserError: Something that is asked for is wrong or cannot be done here.
    """

    def __init__(self, config: TrainConfig, *, seeds: tuple[int, ...], warmup_steps: int) -> None:
        self._config = config
        self._seeds = seeds
        self._watch = MachineWatch()
        started = time.perf_counter()
        run = TrainingRun(self._run_config(config.seed, stop_after_steps=warmup_steps))
        build_seconds = time.perf_counter() - started
        result = _executed(run)[0]
        self.device = run.device
        seconds_per_step = run.plan.images_per_step / result.images_per_second
        self.facts = VariantFacts(
            device=run.plan.device,
            device_name=run.plan.device_name,
            dataset=run.facts.name,
            train_images=run.facts.train_images,
            image_size=run.plan.image_size,
            images_per_step=run.plan.images_per_step,
            flops_per_image=run.costs.flops_per_image,
            peak_flops=run.costs.peak_flops,
            peak_flops_source=run.costs.peak_source,
            plan=run.plan.as_dict(),
            build_seconds=build_seconds,
            warmup_step_seconds=[seconds_per_step] * result.steps,
        )

    def sample(self, round_number: int) -> Measurement:
        """Train from the beginning to the end."""
        seed = self._config.seed + round_number
        if self._seeds:
            seed = self._seeds[round_number % len(self._seeds)]
        run = TrainingRun(self._run_config(seed))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._watch.start()
        result, curve = _executed(run)
        load = self._watch.stop()
        if result.stopped_by:  # a run in this process hears the signals itself
            raise KeyboardInterrupt(result.stopped_by)
        return Measurement(
            round=round_number,
            seconds=sum(result.epoch_seconds),
            steps=result.steps,
            images=run.plan.batches_per_epoch * run.plan.global_batch_size * run.plan.epochs,
            cpu_seconds=load.cpu_seconds,
            other_cpu_share=load.other_cpu_share,
            peak_memory_bytes=peak_memory(self.device),
            seed=seed,
            acc1=result.last_acc1,
            curve=curve,
            epoch_seconds=list(result.epoch_seconds),
        )

    def close(self) -> None:
        """Nothing stays open between runs."""

    def _run_config(self, seed: int, stop_after_steps: int | None = None) -> TrainConfig:
        return self._config.model_copy(
            update={
                "seed": seed,
                "stop_after_steps": stop_after_steps,
                "resume": "never",
                "tensorboard": False,
                "save_top_k": 0,
            }
        )


def _executed(run: TrainingRun) -> tuple[TrainResult, list[tuple[float, float]]]:
    """The run's result, and its accuracy by the seconds since its start."""
    with tempfile.TemporaryDirectory(prefix="efficient-resnet-") as folder:
        run.config = run.config.model_copy(update={"output_dir": Path(folder)})
        result = run.execute()
        assert result.run_directory is not None
        record = json.loads((result.run_directory / "run.json").read_text(encoding="utf-8"))
    curve, seconds = [], 0.0
    for epoch in record["epochs"]:
        seconds += epoch["seconds"]
        if epoch["val_acc1"] is not None:
            curve.append((seconds, epoch["val_acc1"]))
    return result, curve
