"""One training run, from a configuration to a result: the wiring of all parts."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training_framework.assembly import (
    Loaders,
    assemble_network,
    assemble_schedule,
    assemble_step,
    foreign_facts,
    open_configured_dataset,
    open_loggers,
    prepare_network,
)
from training_framework.checkpoint import CheckpointKeeper, load_checkpoint
from training_framework.config import TrainConfig, config_to_yaml
from training_framework.config.loading import config_to_dict
from training_framework.config.schema import TRAJECTORY_FREE_KEYS
from training_framework.data import Dataset
from training_framework.dataset_facts import DatasetFacts
from training_framework.distributed import Processes, process_group, share_buffers
from training_framework.errors import UserError
from training_framework.evaluation import Evaluation, evaluate
from training_framework.flops import training_flops_per_image
from training_framework.hardware import (
    Hardware,
    detect_hardware,
    library_versions,
    measure_peak_flops,
)
from training_framework.loggers import LoggerGroup
from training_framework.models import save_weights
from training_framework.network import NetworkCard
from training_framework.plan import TrainPlan, make_plan
from training_framework.precision import compute_dtype
from training_framework.progress import Progress, TrainResult
from training_framework.reproducibility import seed_everything, use_deterministic_algorithms
from training_framework.run_directory import (
    create_run_directory,
    run_directory_of,
    write_json,
    write_text_atomically,
)
from training_framework.step import TrainStep
from training_framework.trainer import Trainer

__all__ = ["TrainingRun"]


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
        train_loader: Iterable[Any] | None = None,
        val_loader: Iterable[Any] | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.processes = Processes.from_environment()
        self.checkpoint = load_checkpoint(config.resume) if config.resume else None
        if self.checkpoint is not None:
            _check_resumption(config, self.checkpoint)
        self.hardware = detect_hardware()
        self.source: Dataset | tuple[Iterable[Any], Iterable[Any] | None]
        batches = None
        if train_loader is None:
            self.source = open_configured_dataset(config)
            self.facts = self.source.facts
        else:
            batches = _length(train_loader)
            self.source = (train_loader, val_loader)
            self.facts = foreign_facts(train_loader, val_loader, config.num_classes)
        self.plan = make_plan(
            config,
            self.hardware,
            self.facts,
            world_size=self.processes.world_size,
            local_world_size=self.processes.local_world_size,
            batches_per_epoch=batches,
        )
        if model is not None and config.small_map_convolutions == "auto":
            # Only of our own networks do we know that nothing but a step's gradient is wanted.
            self.plan = dataclasses.replace(self.plan, small_map_convolutions=False)
        self.device = self.plan.torch_device(self.processes.local_rank)

    def execute(self) -> TrainResult:
        """Train; what was opened is closed again whatever happens."""
        self.set_up_torch()
        with ExitStack() as stack:
            stack.enter_context(process_group(self.processes, self.device))
            seed_everything(self.config.seed)
            model, lines = self._network()
            step = assemble_step(self.config, self.plan, model, self.device)
            progress = self._restore(model, step)
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
            self._measure_costs(model)
            # Last, so that a run that cannot start leaves no empty folder behind.
            directory = self._directory() if self.processes.is_first else None
            trainer = Trainer(
                plan=self.plan,
                step=step,
                loader=loaders.train,
                transform=loaders.train_transform,
                evaluate=self._evaluation(evaluated, loaders),
                schedule=assemble_schedule(self.config, self.plan),
                progress=progress,
                flops_per_image=self.flops_per_image,
                peak_flops=self.peak_flops,
                log_every_n_steps=self.config.log_every_n_steps,
                stop_after_steps=self.config.stop_after_steps,
                device=self.device,
                run_directory=directory,
                **self._outputs(directory, progress, lines, stack),
            )
            started = time.time()
            result = trainer.fit()
            self.model = evaluated
            if directory is not None:
                save_weights(
                    evaluated.state_dict(),
                    directory / "weights.safetensors",
                    self._card().as_metadata(),
                )
                self._record(directory, result, trainer.progress, started)
        return result

    def set_up_torch(self) -> None:
        """Threads, kernel choice and determinism of this process, as planned."""
        torch.set_num_threads(self.plan.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
        if self.config.deterministic:
            use_deterministic_algorithms(self.device.type)

    def _measure_costs(self, model: nn.Module) -> None:
        """What MFU is made of: the FLOPs of an image, and the devices' peak."""
        peak, self.peak_source = measure_peak_flops(
            self.plan.device, self.plan.device_name, compute_dtype(self.plan.precision)
        )
        self.peak_flops = peak * self.plan.world_size
        self.flops_per_image = training_flops_per_image(model, self.plan.image_size)

    def _costs_line(self) -> str:
        """What MFU is the quotient of, for people."""
        work = f"training takes {self.flops_per_image / 1e9:.3g} GFLOP an image"
        if not self.peak_flops:
            return f"{work}; MFU n/a: the peak of {self.plan.device_name} is unknown"
        return f"{work}; MFU is of {self.peak_flops / 1e9:.4g} GFLOP/s ({self.peak_source})"

    def _evaluation(self, model: nn.Module, loaders: Loaders) -> Callable[[], Evaluation] | None:
        val = loaders.val
        if val is None:
            return None

        def run_evaluation() -> Evaluation:
            # Every rank has norm statistics of its own; saved, and so evaluated, are rank 0's.
            share_buffers(model)
            return evaluate(
                model,
                val,
                loaders.eval_transform,
                device=self.device,
                num_classes=self.plan.num_classes,
                precision=self.plan.precision,
            )

        return run_evaluation

    def _card(self) -> NetworkCard:
        return NetworkCard(
            model=self.config.model,
            stem=self.plan.stem,
            share_early_weights=self.config.share_early_weights,
            class_names=self.facts.class_names
            or tuple(str(index) for index in range(self.plan.num_classes)),
            image_size=self.plan.image_size,
            mean=self.facts.mean,
            std=self.facts.std,
            center_crop=self.facts.storage == "files",
        )

    def _network(self) -> tuple[nn.Module, list[str]]:
        if self.model is not None:
            return prepare_network(self.config, self.plan, self.model, self.device), []
        return assemble_network(self.config, self.plan, self.device)

    def _restore(self, model: nn.Module, step: TrainStep) -> Progress:
        state = self.checkpoint
        if state is None:
            return Progress()
        try:
            model.load_state_dict(state["model"])
            step.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(
                f"{self.config.resume}: does not fit this run's network or optimizer ({reason})",
                "resume with the configuration that it was trained with",
            ) from None
        if state["scaler"]:
            step.scaler.load_state_dict(state["scaler"])
        if step.average is not None and state["average"] is not None:
            step.average.load_state_dict(state["average"])
        # Sums are added up over the ranks before they are read, so one rank takes them over.
        if step.sums is not None and state["sums"] is not None and self.processes.is_first:
            step.sums.load_state_dict(state["sums"])
        return Progress(**state["progress"])

    def _directory(self) -> Path:
        config = self.config
        if config.resume is not None and config.resume.name == "last.ckpt":
            directory = run_directory_of(config.resume)
            if directory is not None:
                return directory
        name = config.name or f"{config.model}-{self.facts.name}"
        directory = create_run_directory(config.output_dir, name)
        resolved = config.model_copy(update={"resume": None})
        write_text_atomically(directory / "config.yaml", config_to_yaml(resolved))
        return directory

    def _outputs(
        self, directory: Path | None, progress: Progress, lines: list[str], stack: ExitStack
    ) -> dict[str, Any]:
        """Loggers and checkpoints, of the first process alone."""
        config, plan = self.config, self.plan
        extras = {
            # What resumes the run neither resumes from nor stops where this start did.
            "config": config_to_dict(
                config.model_copy(update={"resume": None, "stop_after_steps": None})
            ),
            "network": self._card().as_dict(),
        }
        if directory is None:
            return {
                "loggers": LoggerGroup([]),
                "advance": lambda step: None,
                "checkpoints": None,
                "checkpoint_extras": extras,
            }
        goes_on = config.resume is not None and directory == run_directory_of(config.resume)
        loggers, console = open_loggers(
            directory,
            plan=plan,
            tensorboard=config.tensorboard,
            resume_step=progress.step if goes_on else None,
        )
        stack.callback(loggers.close)
        opening = _opening_lines(plan, self.facts, self.hardware, directory)
        for line in [*opening[:-1], self._costs_line(), *lines, opening[-1]]:
            loggers.message(line)
        return {
            "loggers": loggers,
            "advance": console.advance,
            "checkpoints": CheckpointKeeper(
                directory / "checkpoints", prefix=config.model, keep=config.save_top_k
            ),
            "checkpoint_extras": extras,
        }

    def _record(
        self, directory: Path, result: TrainResult, progress: Progress, started: float
    ) -> None:
        """Write run.json: what ran, on what, and what came of it."""
        write_json(
            directory / "run.json",
            {
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
                "seconds": time.time() - started,
                "resumed_from": self.config.resume,
                "versions": library_versions(),
                "hardware": dataclasses.asdict(self.hardware),
                "data": dataclasses.asdict(self.facts),
                "config": config_to_dict(self.config),
                "plan": self.plan.as_dict(),
                "training_flops_per_image": self.flops_per_image,
                "peak_flops": self.peak_flops,
                "peak_flops_source": self.peak_source,
                "epochs": progress.epochs,
                "results": dataclasses.asdict(result),
            },
        )


def _length(loader: Iterable[Any]) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        raise UserError(
            f"the {type(loader).__name__} has no length",
            "pass a loader whose len() is its number of batches",
        ) from None


def _check_resumption(config: TrainConfig, checkpoint: Mapping[str, Any]) -> None:
    """Refuse settings that would lead elsewhere than the run that is resumed."""
    if config.allow_config_change:
        return
    now = config_to_dict(config)
    differing = [
        f"{key} {then!r} -> {now[key]!r}"
        for key, then in checkpoint["config"].items()
        if key in now and key not in TRAJECTORY_FREE_KEYS and now[key] != then
    ]
    if differing:
        raise UserError(
            f"{config.resume}: its run had other settings: {', '.join(differing)}",
            "drop them, or go on with --allow-config-change",
        )


def _opening_lines(
    plan: TrainPlan, facts: DatasetFacts, hardware: Hardware, directory: Path | None
) -> list[str]:
    lines = [f"note: {gpu.name} {gpu.fault}" for gpu in hardware.accelerators if gpu.fault]
    layout = "channels_last" if plan.channels_last else "contiguous"
    compiled = f", compiled ({plan.compile_mode})" if plan.compile else ""
    lines.append(
        f"{facts.name}: {facts.train_images:,} training and {facts.val_images:,} validation "
        f"images, {plan.num_classes} classes, {plan.image_size} px"
    )
    lines.append(
        f"{plan.device} ({plan.device_name}), precision {plan.precision}, {layout}{compiled}; "
        f"{plan.total_steps:,} steps"
    )
    return [*lines, f"run directory: {directory}"]
