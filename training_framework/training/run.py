"""One training run, from a configuration to a result: the wiring of all parts."""

import dataclasses
import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training_framework.config import TrainConfig, config_to_yaml
from training_framework.data import Dataset, Loader
from training_framework.data.user_facts import user_loader_facts
from training_framework.data.user_loader import batch_count
from training_framework.data.user_look import LookedAtLoader
from training_framework.loggers import LoggerGroup
from training_framework.machine.distributed import (
    Processes,
    as_first_said,
    process_group,
    share_buffers,
)
from training_framework.machine.hardware import Hardware, detect_hardware
from training_framework.machine.memory import keep_freed_memory
from training_framework.machine.randomness import seed_everything, use_deterministic_algorithms
from training_framework.models import plain_network, save_weights
from training_framework.models.flops import training_flops_per_image
from training_framework.plan import make_plan
from training_framework.runs.directory import check_space, check_writable, create_run_directory
from training_framework.runs.network_card import NetworkCard
from training_framework.runs.progress import Progress, TrainResult
from training_framework.runs.record import Costs, opening_lines, write_record
from training_framework.runs.start import Start, choose_start, refuse_other_settings
from training_framework.training.assembly import (
    Loaders,
    assemble_schedule,
    assemble_step,
    open_configured_dataset,
    open_loggers,
    sample_name,
)
from training_framework.training.evaluation import Evaluation, evaluate
from training_framework.training.network_assembly import assemble_network, prepare_network
from training_framework.training.resuming import (
    checkpoint_extras,
    open_keeper,
    restore,
    restore_draws,
    training_data,
)
from training_framework.training.rows import Evaluate
from training_framework.training.step import TrainStep
from training_framework.training.trainer import Trainer
from training_framework.training.user_network import class_of

__all__ = ["TrainingRun"]


def _agreed(hardware: Hardware) -> Hardware:
    """The machine with one measured speed for all processes, so that all plan alike."""
    if hardware.bf16_speed is None:
        return hardware
    speed = as_first_said("bf16_speed", repr(hardware.bf16_speed))
    return dataclasses.replace(hardware, bf16_speed=float(speed))


class TrainingRun:
    """A run that is planned but not started.

    Args:
        config: What is asked for.
        model: The user's own network; None builds the configured one.
        train_loader: The user's own loader; None opens the configured data.
        val_loader: Likewise, for evaluation.

    Attributes:
        model: The trained network after `execute`: the weight average where there is one.
        plan: What was decided.

    Raises:
        UserError: Something that is asked for is wrong or cannot be done here.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: nn.Module | None = None,
        train_loader: LookedAtLoader | None = None,
        val_loader: LookedAtLoader | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.own_network = None if model is None else class_of(model)
        self.processes = Processes.from_environment()
        self.hardware = _agreed(detect_hardware())
        self.source: Dataset | tuple[LookedAtLoader, LookedAtLoader | None]
        batches = None
        if train_loader is None:
            self.source = open_configured_dataset(config)
            self.facts = self.source.facts
        else:
            batches = batch_count(train_loader)
            self.source = (train_loader, val_loader)
            self.facts = user_loader_facts(train_loader, val_loader, config.num_classes)
        self.plan = make_plan(
            config,
            self.hardware,
            self.facts,
            world_size=self.processes.world_size,
            local_world_size=self.processes.local_world_size,
            batches_per_epoch=batches,
        )
        if model is not None:
            # Only of our own networks do we know that nothing but a step's gradient is wanted.
            self.plan = dataclasses.replace(
                self.plan,
                small_map_convolutions=config.small_map_convolutions is True,
                winograd_convolutions=config.winograd_convolutions is True,
                fused_norms=config.fused_norms is True,
            )
        self.device = self.plan.torch_device(self.processes.local_rank)

    def execute(self) -> TrainResult:
        """Train; what was opened is closed again whatever happens."""
        self.set_up_torch()
        with process_group(self.processes, self.device):
            return self._train()

    def _train(self) -> TrainResult:
        """What `execute` does in the processes' group, which no variable here outlives."""
        with ExitStack() as stack:
            start = self._start(stack)
            seed_everything(self.config.seed)
            model, lines = self._network(start)
            stack.callback(plain_network, model)  # a user's own network, whatever happens
            if isinstance(self.source, Dataset):
                lines = [*self.source.notes, *lines]
            step = assemble_step(self.config, self.plan, model, self.device)
            is_first = self.processes.is_first
            progress = restore(start, model=model, step=step, plan=self.plan, is_first=is_first)
            loaders = Loaders.assemble(
                self.config,
                self.plan,
                self.facts,
                source=self.source,
                processes=self.processes,
                device=self.device,
            )
            stack.callback(loaders.close)
            evaluated = model if step.average is None else step.average.model
            self.costs = Costs.measure(
                self.plan, flops_per_image=training_flops_per_image(model, self.plan.image_size)
            )
            # Last, so that a run that cannot start leaves no empty folder behind.
            directory = self._directory(start, step, stack) if is_first else None
            outputs = self._outputs(
                directory,
                start,
                progress=progress,
                lines=lines,
                loader=loaders.train,
                stack=stack,
            )
            if directory is not None:
                loaders.report_to(outputs["loggers"].message, directory / "bad_images.txt")
            trainer = self._trainer(step, loaders, evaluated, progress, outputs)
            restore_draws(start, loader=loaders.train, device=self.device)
            start = dataclasses.replace(start, state=None)  # a second copy of all, from here on
            clocks = (time.time(), time.perf_counter())
            result = trainer.fit()
            result = dataclasses.replace(result, bad_images=loaders.share_bad_images())
            self.model = plain_network(evaluated)
            if directory is not None:
                outputs["checkpoints"].wait()  # what it could not write is no end in good order
                self._leave_results(
                    directory,
                    evaluated,
                    start=start,
                    progress=trainer.progress,
                    result=result,
                    clocks=clocks,
                )
        return result

    def _trainer(
        self,
        step: TrainStep,
        loaders: Loaders,
        evaluated: nn.Module,
        progress: Progress,
        outputs: dict[str, Any],
    ) -> Trainer:
        return Trainer(
            plan=self.plan,
            step=step,
            loader=loaders.train,
            transform=loaders.train_transform,
            evaluate=self._evaluation(evaluated, loaders),
            schedule=assemble_schedule(self.config, self.plan),
            progress=progress,
            flops_per_image=self.costs.flops_per_image,
            peak_flops=self.costs.peak_flops,
            log_every_n_steps=self.config.log_every_n_steps,
            stop_after_steps=self.config.stop_after_steps,
            device=self.device,
            sample_name=functools.partial(sample_name, self.source),
            auto_micro_batch=self.config.auto_micro_batch,
            **outputs,
        )

    def _leave_results(
        self,
        directory: Path,
        model: nn.Module,
        *,
        start: Start,
        progress: Progress,
        result: TrainResult,
        clocks: tuple[float, float],
    ) -> None:
        """Write the weights, and run.json last: it says that the run is over."""
        path = directory / "weights.safetensors"
        save_weights(model.state_dict(), path, self._card().as_metadata())
        write_record(
            directory,
            config=self.config,
            plan=self.plan,
            facts=self.facts,
            network=self._card(),
            hardware=self.hardware,
            costs=self.costs,
            resumed_from=start.checkpoint,
            started=clocks[0],
            seconds=time.perf_counter() - clocks[1],
            progress=progress,
            result=result,
        )

    def _start(self, stack: ExitStack) -> Start:
        """Where to start from, in a place that can be written to."""
        parent = self.config.output_dir / self._name
        start = choose_start(self.config, self._name, self.processes)
        if start.lock is not None:
            stack.callback(start.lock.release)
        if self.processes.is_first:
            check_writable(parent if start.directory is None else start.directory / "checkpoints")
        refuse_other_settings(
            self.config,
            start,
            facts=training_data(self.facts, self.plan),
            class_names=self._card().class_names,
        )
        return start

    @property
    def _name(self) -> str:
        return self.config.name or f"{self.own_network or self.config.model}-{self.facts.name}"

    def set_up_torch(self) -> None:
        """Threads, kernel choice and determinism of this process, as planned."""
        torch.set_num_threads(self.plan.threads)
        if self.plan.keep_memory:
            keep_freed_memory()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
        if self.config.deterministic:
            use_deterministic_algorithms(self.device.type)

    def _evaluation(self, model: nn.Module, loaders: Loaders) -> Evaluate | None:
        val = loaders.val
        if val is None:
            return None

        def run_evaluation(should_stop: Callable[[], bool] | None) -> Evaluation:
            # Every rank has norm statistics of its own; saved, and so evaluated, are rank 0's.
            share_buffers(model)
            evaluation = evaluate(
                model,
                val,
                loaders.eval_transform,
                device=self.device,
                num_classes=self.plan.num_classes,
                precision=self.plan.precision,
                should_stop=should_stop,
            )
            loaders.share_bad_images()
            return evaluation

        return run_evaluation

    def _card(self) -> NetworkCard:
        return NetworkCard.of(
            self.config.model,
            self.plan,
            self.facts,
            share_early_weights=self.config.share_early_weights,
            own_network=self.own_network,
        )

    def _network(self, start: Start) -> tuple[nn.Module, list[str]]:
        if self.model is not None:
            return prepare_network(self.config, self.plan, self.model, self.device)
        config = self.config
        if start.state is not None:  # whose weights are those that it went on to from these
            config = config.model_copy(update={"weights": None})
        return assemble_network(config, self.plan, self.device)

    def _directory(self, start: Start, step: TrainStep, stack: ExitStack) -> Path:
        """The run directory, locked, on a disk that can hold a checkpoint."""
        config = self.config
        check_space(start.directory or config.output_dir / self._name, step.checkpoint_bytes())
        if start.directory is not None:
            start.set_damaged_aside()
            return start.directory
        # What trains from this file again starts as any other run does.
        resolved = config.model_copy(update={"resume": TrainConfig().resume})
        lock = create_run_directory(
            config.output_dir,
            self._name,
            config_yaml=config_to_yaml(resolved),
            version=start.version,
        )
        stack.callback(lock.release)
        return lock.directory

    def _outputs(
        self,
        directory: Path | None,
        start: Start,
        *,
        progress: Progress,
        lines: list[str],
        loader: Loader,
        stack: ExitStack,
    ) -> dict[str, Any]:
        """Loggers and checkpoints, of the first process alone."""
        config, plan = self.config, self.plan
        extras = checkpoint_extras(config, plan, self.facts, self._card().as_dict())
        if directory is None:
            return {
                "loggers": LoggerGroup([]),
                "advance": lambda step: None,
                "checkpoints": None,
                "checkpoint_extras": extras,
                "run_directory": None,
            }
        loggers, console = open_loggers(
            directory,
            plan=plan,
            tensorboard=config.tensorboard,
            resume_step=None if start.directory is None else progress.logged_step,
        )
        stack.callback(loggers.close)
        opening = opening_lines(plan, self.facts, self.hardware, self.costs)
        resuming = start.opening_lines(progress.step, plan.total_steps)
        for line in [*opening, *lines, *resuming, f"run directory: {directory}"]:
            loggers.message(line)
        keeper = open_keeper(directory, config, loader=loader, device=self.device)
        stack.enter_context(keeper)
        return {
            "loggers": loggers,
            "advance": console.advance,
            "checkpoints": keeper,
            "checkpoint_extras": extras,
            "run_directory": directory,
        }
