"""What a run is made of, built in one place: for training, timing and profiling alike."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training_framework.data import Dataset
from training_framework.machine.distributed import share_buffers
from training_framework.machine.randomness import seed_everything
from training_framework.models.flops import training_flops_per_image
from training_framework.optimizers import Schedule, WeightAverage, build_optimizer, build_schedule
from training_framework.plan import PlannedRun, TrainPlan
from training_framework.runs.record import Costs
from training_framework.switches import set_up_process
from training_framework.training.batch_counting import BatchCounter
from training_framework.training.cuda_graph import CudaGraphStep
from training_framework.training.evaluation import Evaluate, Evaluation, evaluate
from training_framework.training.loaders import Loaders, sample_name
from training_framework.training.metrics import ClassificationSums
from training_framework.training.network_assembly import assemble_network, prepare_network
from training_framework.training.recording import CudaRecord
from training_framework.training.step import TrainStep

__all__ = ["Parts", "build_parts", "build_plan_schedule", "build_step"]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run is made of.

    Attributes:
        planned: The plan that it was built from, and what that rests on.
        device: Where the network is.
        model: The network that is trained, without DDP around it.
        step: Makes the optimizer steps with it.
        loaders: Training and validation batches, and their transforms.
        schedule: Multiplier of the plan's learning rate by step.
        sample_name: From a sample's position in the training split to its name in messages.
        lines: What there is to say about the building.
    """

    planned: PlannedRun
    device: torch.device
    model: nn.Module
    step: TrainStep
    loaders: Loaders
    schedule: Schedule
    sample_name: Callable[[int], str]
    lines: tuple[str, ...]

    @property
    def plan(self) -> TrainPlan:
        """Everything that is decided."""
        return self.planned.plan

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and saved: the weight average where there is one."""
        return self.model if self.step.average is None else self.step.average.model

    @functools.cached_property
    def costs(self) -> Costs:
        """What MFU is made of; measuring the peak of a CPU takes a moment."""
        return Costs.measure(self.plan, flops_per_image=self.flops_per_image)

    @functools.cached_property
    def flops_per_image(self) -> float:
        """Training FLOPs of an image."""
        return training_flops_per_image(self.model, self.plan.image_size)

    @functools.cached_property
    def _counter(self) -> BatchCounter:
        return BatchCounter(
            self.evaluated,
            self.loaders.eval_transform,
            device=self.device,
            num_classes=self.plan.num_classes,
            precision=self.plan.precision,
            record=CudaRecord() if self.plan.cuda_graph else None,
        )

    @property
    def evaluate(self) -> Evaluate | None:
        """One evaluation, which may ask whether to stop; None where there is no validation set."""
        loaders, counter = self.loaders, self._counter
        device, val = self.device, loaders.val
        if val is None:
            return None
        counter.limit(self.step.micro_batch_size)

        # Without `self`: after an error the closure would keep the step, and with it DDP.
        def run_evaluation(should_stop: Callable[[], bool] | None) -> Evaluation:
            # Every rank has norm statistics of its own; saved, and so evaluated, are rank 0's.
            share_buffers(counter.model)
            evaluation = evaluate(counter, val, device=device, should_stop=should_stop)
            loaders.share_bad_images()
            return evaluation

        return run_evaluation

    def report_to(self, report: Callable[[str], None], bad_images_file: Path) -> None:
        """Say what happens while training through `report`, and list bad images in a file."""
        self.step.report_to(report)
        self._counter.report = report
        self.loaders.report_to(report, bad_images_file)

    def close(self) -> None:
        """End the loaders' processes."""
        self.loaders.close()


def build_parts(
    planned: PlannedRun, *, network: nn.Module | None = None, with_weights: bool = True
) -> Parts:
    """Build what a plan says, and set up this process as it says: threads, kernels, generators.

    Several processes must have formed their group.

    Args:
        planned: The plan, and what it rests on.
        network: The user's own, where the plan has one.
        with_weights: Whether to load the plan's `weights`; a checkpoint's weights replace them.

    Raises:
        UserError: The weights cannot be read, kernels cannot be compiled, or a validation file is
            empty.
    """
    plan, source = planned.plan, planned.source
    device = plan.torch_device(planned.processes.local_rank)
    _set_up_process(plan, device)
    if network is None:
        model, lines = assemble_network(plan, device, with_weights=with_weights)
    else:
        model, lines = prepare_network(plan, network, device), []
    step = build_step(plan, model, device)
    return Parts(
        planned=planned,
        device=device,
        model=model,
        step=step,
        loaders=Loaders.build(planned, device),
        schedule=build_plan_schedule(plan),
        sample_name=functools.partial(sample_name, source),
        lines=(*(source.notes if isinstance(source, Dataset) else ()), *lines),
    )


def _set_up_process(plan: TrainPlan, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    set_up_process(plan.switch_values(), device.type)
    seed_everything(plan.seed)


def build_step(plan: TrainPlan, model: nn.Module, device: torch.device) -> TrainStep:
    """What makes the optimizer steps, around a network on its device."""
    wrapped = model
    if plan.world_size > 1:
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    # DDP has now given every rank the weights of rank 0, so all ranks average the same weights.
    average = WeightAverage(model, decay=plan.ema_decay) if plan.ema_decay else None
    optimizer = build_optimizer(
        model,
        name=plan.optimizer,
        lr=plan.lr,
        momentum=plan.momentum,
        nesterov=plan.nesterov,
        weight_decay=plan.weight_decay,
        decay_norm_and_bias=plan.decay_norm_and_bias,
        beta1=plan.beta1,
        beta2=plan.beta2,
        eps=plan.eps,
        fused=plan.fused_optimizer,
    )
    make_step: Callable[..., TrainStep] = TrainStep
    if plan.cuda_graph:
        is_required = "cuda_graph" in plan.asked_for
        make_step = functools.partial(CudaGraphStep, is_required=is_required)
    return make_step(
        wrapped,
        optimizer,
        device_type=device.type,
        precision=plan.precision,
        label_smoothing=plan.label_smoothing,
        grad_clip_val=plan.grad_clip_val,
        sums=ClassificationSums(device, num_classes=plan.num_classes),
        average=average,
        master_weights=plan.master_weights,
        compile_mode=plan.compile_mode if plan.compile else None,
        needs_compile="compile" in plan.asked_for,
    )


def build_plan_schedule(plan: TrainPlan) -> Schedule:
    """The learning-rate schedule of a plan, in steps."""
    options: dict[str, Any] = {}
    if plan.scheduler == "step":
        options = {"step_size": plan.step_size_steps, "gamma": plan.gamma}
    elif plan.scheduler == "multi_step":
        options = {"milestones": plan.milestones_steps, "gamma": plan.gamma}
    return build_schedule(
        plan.scheduler,
        total_steps=plan.total_steps,
        warmup_steps=plan.warmup_steps,
        **options,
    )
