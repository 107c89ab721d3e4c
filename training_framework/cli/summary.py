"""Plans and results as text for people, at most 80 columns wide."""

import textwrap

from training_framework.data.facts import DatasetFacts
from training_framework.machine.hardware import Hardware
from training_framework.plan import TrainPlan
from training_framework.runs.progress import TrainResult
from training_framework.runs.record import busy_machine_note

__all__ = ["plan_lines", "result_lines"]

WIDTH = 80


def plan_lines(plan: TrainPlan, hardware: Hardware, facts: DatasetFacts) -> list[str]:
    """The plan of a run: every choice with its reason."""
    memory = f"{hardware.memory_bytes / 2**30:.0f} GB"
    busy = busy_machine_note(plan, hardware)
    sets = ", ".join(hardware.instruction_sets) or "no known vector extensions"
    lines = [
        *_wrapped(f"machine   {hardware.cpu_name}, {hardware.cores} core(s), {memory}, {sets}"),
        *(
            line
            for gpu in hardware.accelerators
            for line in _wrapped(f"          {gpu.name} {gpu.fault or 'usable'}")
        ),
        *_wrapped(f"          note: {busy}" if busy else ""),
        *_wrapped(
            f"data      {facts.name}: {facts.train_images:,} training, {facts.val_images:,} "
            f"validation images, {plan.num_classes} classes, {plan.image_size} px"
        ),
        *_wrapped(
            f"steps     {plan.total_steps:,} = {_epochs(plan.epochs)} x {plan.steps_per_epoch:,}, "
            f"of {plan.images_per_step} images: {plan.accumulate_grad_batches} x "
            f"{plan.world_size} device(s) x {plan.device_batch_size}"
        ),
        *_wrapped(f"evaluate  every {plan.evaluation_interval_steps:g} steps and after the last"),
        "",
        f"{'choice':<22} {'value':<16} why",
    ]
    for choice in plan.choices:
        head = f"{choice.name:<22} {choice.value:<16} "
        lines += _wrapped(head + choice.reason, indent=len(head) if len(head) < 42 else 24)
    return lines


def _epochs(count: float) -> str:
    return f"{count:,} epoch" if count == 1 else f"{count:,} epochs"


def _wrapped(text: str, indent: int = 10) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=" " * indent, drop_whitespace=True, break_long_words=False
    )


def result_lines(result: TrainResult) -> list[str]:
    """The numbers to print at the end of a run."""
    lines = [""]
    if result.stopped_by:
        lines.append(f"stopped by {result.stopped_by} after {result.steps:,} steps; resume with")
        lines.append(
            f"  efficient-resnet train --resume {result.run_directory}/checkpoints/last.ckpt"
        )
    if result.best_acc1 is not None:
        lines.append(f"best   top-1 {result.best_acc1:6.2f}%   top-5 {result.best_acc5:6.2f}%")
    if result.last_acc1 is not None:
        lines.append(
            f"last   top-1 {result.last_acc1:6.2f}%   top-5 {result.last_acc5:6.2f}%   "
            f"loss {result.val_loss:.4f}"
        )
    if result.last_acc1_tta is not None:
        lines.append(f"       top-1 {result.last_acc1_tta:6.2f}%   with test-time augmentation")
    if result.epoch_seconds:
        total = sum(result.epoch_seconds)
        lines.append(
            f"time   {total:.1f} s for {_epochs(len(result.epoch_seconds))}, "
            f"{total / len(result.epoch_seconds):.1f} s each with evaluation"
        )
    if result.bad_images:
        lines.append(f"data   {result.bad_images:,} bad images skipped, listed in bad_images.txt")
    lines.append(f"speed  {result.images_per_second:,.0f} training images/s")
    lines.append(f"files  {result.run_directory}")
    return lines
