"""The parts of a configured run, built as for training, to be driven by measurements."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training_framework.config import TrainConfig
from training_framework.data import Batch
from training_framework.data.facts import DatasetFacts
from training_framework.errors import UserError
from training_framework.loggers import CsvLogger, Logger, TensorBoardLogger
from training_framework.machine.hardware import Hardware
from training_framework.machine.randomness import seed_everything
from training_framework.optimizers import Schedule
from training_framework.plan import TrainPlan
from training_framework.training.assembly import (
    Loaders,
    assemble_schedule,
    assemble_step,
)
from training_framework.training.network_assembly import assemble_network
from training_framework.training.run import TrainingRun
from training_framework.training.step import TrainStep

__all__ = ["RunParts", "synchronize"]


@dataclass(kw_only=True)
class RunParts:
    """A run that is built and not started.

    Attributes:
        plan: The run's own plan.
        loaders: Its loaders and transforms; a measurement may put another train loader in.
    """

    config: TrainConfig
    plan: TrainPlan
    facts: DatasetFacts
    hardware: Hardware
    device: torch.device
    step: TrainStep
    loaders: Loaders

    @classmethod
    def assemble(cls, config: TrainConfig) -> "RunParts":
        """Build the parts, and set up this process's threads and kernels as for training.

        Raises:
            UserError: Something that is asked for is wrong or cannot be done here.
        """
        run = TrainingRun(config)  # a checkpoint's weights take as long as any others
        if run.plan.world_size > 1:
            raise UserError(
                f"profile: torchrun started {run.plan.world_size} processes",
                "start it without torchrun: it measures one device",
            )
        run.set_up_torch()
        seed_everything(config.seed)
        model, _ = assemble_network(config, run.plan, run.device)
        return cls(
            config=config,
            plan=run.plan,
            facts=run.facts,
            hardware=run.hardware,
            device=run.device,
            step=assemble_step(config, run.plan, model, run.device),
            loaders=Loaders.assemble(
                config,
                run.plan,
                run.facts,
                source=run.source,
                processes=run.processes,
                device=run.device,
            ),
        )

    @property
    def steps_ahead(self) -> int:
        """Steps that the loader's processes can have prepared: a head start that is no speed."""
        if self.plan.resident_data:
            return 0
        batches = self.plan.num_workers * self.config.prefetch_factor
        return -(-batches // self.plan.accumulate_grad_batches)

    def plan_for_steps(self, steps: int) -> TrainPlan:
        """The plan, made longer where it has fewer steps."""
        plan = self.plan
        if plan.total_steps >= steps:
            return plan
        epochs = -(-steps // plan.steps_per_epoch)
        return dataclasses.replace(plan, epochs=epochs, total_steps=epochs * plan.steps_per_epoch)

    def schedule_for(self, plan: TrainPlan) -> Schedule:
        """The learning-rate schedule of a plan."""
        return assemble_schedule(self.config, plan)

    def open_file_loggers(self, folder: Path) -> list[Logger]:
        """The run's sinks that write files; the progress bar would mix with the measurement's."""
        sinks: list[Logger] = [CsvLogger(folder / "metrics.csv")]
        if self.config.tensorboard:
            sinks.append(TensorBoardLogger(folder))
        return sinks

    def step_on(self, batch: Batch) -> None:
        """An optimizer step on one loaded batch, taken as often as the run accumulates."""
        group = self.plan.accumulate_grad_batches
        for position in range(group):
            images, labels, mixed = self.loaders.train_transform(batch, step=0, epoch=0)
            others: tuple[Tensor, Tensor] | None = None
            if mixed is not None:
                others = (mixed.other_labels, mixed.lam)
            self.step.accumulate(
                images,
                labels,
                others,
                group_size=group,
                last_of_group=position == group - 1,
            )
        # The weights stay where they are: one batch over and over would lead them astray.
        self.step.update(0.0, step=0)

    def close(self) -> None:
        """End the loaders' processes."""
        self.loaders.close()


def synchronize(device: torch.device) -> None:
    """Wait for the device; the CPU is never ahead of itself."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
