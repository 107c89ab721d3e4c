"""What a run is made of, built in one place: for training, timing and profiling alike."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from training_framework.data import Dataset
from training_framework.machine.distributed import share_buffers
from training_framework.machine.randomness import seed_everything
from training_framework.models.flops import forward_flops_per_image, training_flops_per_image
from training_framework.models.whitening import first_convolution
from training_framework.optimizers import (
    EvenAverage,
    Lookahead,
    MuonOptions,
    Schedule,
    TrainedFor,
    WeightAverage,
    build_optimizer,
    build_schedule,
)
from training_framework.plan import PlannedRun, TrainPlan
from training_framework.runs.record import Costs
from training_framework.schedules import schedule_options
from training_framework.switches import set_up_process
from training_framework.training.batch_counting import BatchCounter
from training_framework.training.cuda_graph import CudaGraphStep
from training_framework.training.data_parallel import in_data_parallel
from training_framework.training.evaluation import Evaluate, Evaluation, evaluate
from training_framework.training.loaders import Loaders, sample_name
from training_framework.training.metrics import ClassificationSums
from training_framework.training.network_assembly import assemble_network, prepare_network
from training_framework.training.norm_statistics import recompute_norms
from training_framework.training.recording import CudaRecord
from training_framework.training.selection import HardestImages, Select, all_images
from training_framework.training.step import TrainStep
from training_framework.training.whitening import whiten

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
        select: Chooses the images of a batch to train on.
    """

    planned: PlannedRun
    device: torch.device
    model: nn.Module
    step: TrainStep
    loaders: Loaders
    schedule: Schedule
    sample_name: Callable[[int], str]
    lines: tuple[str, ...]
    select: Select = all_images
    _flops_by_size: dict[int, float] = field(default_factory=dict, init=False, repr=False)

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
        """Training FLOPs of an image, on average over the run."""
        resolutions, epochs = self.plan.resolutions, self.plan.epochs
        if resolutions is None:
            return self.flops_in(0)
        lengths = resolutions.by_epoch(epochs)
        total = sum(length * self.flops_in(epoch) for epoch, (length, _) in enumerate(lengths))
        return total / sum(length for length, _ in lengths)

    def flops_in(self, epoch: int) -> float:
        """Training FLOPs of an image in an epoch, counted from 0; 0 if they cannot be counted."""
        plan = self.plan
        size = plan.image_size if plan.resolutions is None else plan.resolutions.at(epoch)
        if size not in self._flops_by_size:
            flops: float = training_flops_per_image(self.model, size)
            if flops and plan.train_on_hardest:  # every image passes forward, few go on
                flops = forward_flops_per_image(self.model, size) + plan.train_on_hardest * flops
            self._flops_by_size[size] = flops
        return self._flops_by_size[size]

    @functools.cached_property
    def counter(self) -> BatchCounter:
        """Counts the batches of all evaluations."""
        return BatchCounter(
            self.evaluated,
            self.loaders.eval_transform,
            device=self.device,
            num_classes=self.plan.num_classes,
            precision=self.plan.precision,
            tta=self.plan.tta,
            record=CudaRecord() if self.plan.cuda_graph else None,
        )

    @property
    def evaluate(self) -> Evaluate | None:
        """One evaluation, which may ask whether to stop; None where there is no validation set."""
        loaders, counter, recompute = self.loaders, self.counter, self._recompute_norms()
        device, val = self.device, loaders.val
        if val is None:
            return None
        counter.limit(self.step.micro_batch_size)

        # Without `self`: after an error the closure would keep the step, and with it DDP.
        def run_evaluation(should_stop: Callable[[], bool] | None) -> Evaluation:
            if recompute is not None:
                recompute()
            # Every rank has norm statistics of its own; saved, and so evaluated, are rank 0's.
            share_buffers(counter.model)
            evaluation = evaluate(counter, val, device=device, should_stop=should_stop)
            loaders.share_bad_images()
            return evaluation

        return run_evaluation

    def report_to(self, report: Callable[[str], None], bad_images_file: Path) -> None:
        """Say what happens while training through `report`, and list bad images in a file."""
        self.step.report_to(report)
        self.counter.report = report
        self.loaders.report_to(report, bad_images_file)

    def _recompute_norms(self) -> Callable[[], None] | None:
        """What gives the norms of the weight average new statistics, where the plan asks for it."""
        loaders, plan, average = self.loaders, self.plan, self.step.average
        if loaders.norms is None or average is None:
            return None
        return functools.partial(
            recompute_norms,
            average.model,
            loaders.norms,
            loaders.train_transform,
            batches=plan.recompute_norm_batches,
            epoch=math.ceil(plan.epochs) - 1,  # the images have the size of the last one
            device_type=self.device.type,
            precision=plan.precision,
        )

    def close(self) -> None:
        """End the loaders' processes, and free the recorded step."""
        self.loaders.close()
        if isinstance(self.step, CudaGraphStep):
            self.step.forget_recording()


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
    if plan.whitening and with_weights and plan.weights is None:
        whiten(model, planned, device)
    step = build_step(plan, model, device)
    return Parts(
        planned=planned,
        device=device,
        model=model,
        step=step,
        loaders=Loaders.build(planned, device),
        schedule=build_plan_schedule(plan),
        sample_name=functools.partial(sample_name, source),
        select=HardestImages(step, plan, device.type) if plan.train_on_hardest else all_images,
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
    wrapped, stream = _wrapped(plan, model, device)
    # DDP has now given every rank the weights of rank 0, so all ranks average the same weights.
    average = WeightAverage(model, decay=plan.ema_decay) if plan.ema_decay else None
    if plan.average_from:
        average = EvenAverage(model, first_step=round(plan.average_from * plan.total_steps))
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
        bias_lr_factor=plan.bias_lr_factor,
        trained_for=_trained_for(plan, model),
        muon=MuonOptions(
            rest=plan.muon_rest,
            rest_lr=plan.muon_rest_lr,
            momentum=plan.muon_momentum,
            iterations=plan.muon_iterations,
            normalize=plan.muon_normalize,
        ),
    )
    make_step: Callable[..., TrainStep] = TrainStep
    if plan.cuda_graph:
        is_required = "cuda_graph" in plan.asked_for or stream is not None
        make_step = functools.partial(CudaGraphStep, is_required=is_required, ddp_stream=stream)
    step = make_step(
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
    if plan.lookahead_steps:
        step.lookahead = Lookahead(
            optimizer, every=plan.lookahead_steps, share=plan.lookahead_share
        )
    return step


def _wrapped(
    plan: TrainPlan, model: nn.Module, device: torch.device
) -> tuple[nn.Module, torch.cuda.Stream | None]:
    """The network in DDP where several processes train, and the stream of it if it is recorded."""
    if plan.world_size == 1:
        return model, None
    stream = torch.cuda.Stream(device) if plan.cuda_graph else None
    return in_data_parallel(model, device, stream), stream


def _trained_for(plan: TrainPlan, model: nn.Module) -> dict[nn.Parameter, TrainedFor]:
    """The parameters that are not trained to the end: the bias of a whitening convolution."""
    convolution = first_convolution(model) if plan.whitening else None
    if convolution is None or not isinstance(convolution.bias, nn.Parameter):
        return {}
    then_freezes = plan.world_size == 1 and not plan.compile
    return {convolution.bias: TrainedFor(plan.whitening_bias_steps, then_freezes)}


def build_plan_schedule(plan: TrainPlan) -> Schedule:
    """The learning-rate schedule of a plan, in steps."""
    settings = {
        "step_size": plan.step_size_steps,
        "milestones": plan.milestones_steps,
        "gamma": plan.gamma,
        "decay_fraction": plan.decay_fraction,
        "final_fraction": plan.final_lr_fraction,
    }
    known = schedule_options(plan.scheduler)
    options = {key: value for key, value in settings.items() if key in known}
    return build_schedule(
        plan.scheduler,
        total_steps=plan.total_steps,
        warmup_steps=plan.warmup_steps,
        **options,
    )
