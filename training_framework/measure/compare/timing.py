"""Times one variant's optimizer steps, with the loader, transform and step of a real run."""

import sys
import time
from collections.abc import Iterator

import torch

from training_framework.config import TrainConfig
from training_framework.data import Batch
from training_framework.machine.load import MachineWatch
from training_framework.machine.memory import peak_memory
from training_framework.machine.peak_flops import measure_peak_flops
from training_framework.measure.compare.result import Measurement, VariantFacts
from training_framework.measure.compare.step_times import time_steps
from training_framework.plan import plan_run
from training_framework.training.parts import build_parts

__all__ = ["CLOCK", "StepSampler"]

CLOCK = (
    "optimizer steps: waiting for data, its copy and augmentation, forward, backward, update; "
    "without compilation, evaluation, logging and checkpoints"
)
# After the other variants' turns, caches are cold, and a compiler's first step is slow.
STEPS_TO_WARM_UP_AGAIN = 2
FEWEST_STEPS = 3


class StepSampler:
    """A variant that is built and ready to be timed; it continues training from sample to sample.

    Args:
        config: What to build.
        steps: Timed steps in a sample; None: as many as fit into `seconds`, at least 3, decided
            once, after the warm-up.
        seconds: See `steps`.
        warmup_steps: Steps before the first sample.
        peak: The device's peak FLOP/s in the precision used, and its source; None: measure it or
            look it up.

    Attributes:
        facts: What was built, and how it warmed up.

    Raises:
        UserError: A setting is wrong or cannot be used on this machine.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        steps: int | None,
        seconds: float,
        warmup_steps: int,
        peak: tuple[float, str] | None = None,
    ) -> None:
        started = time.perf_counter()
        planned = plan_run(config)
        plan, facts = planned.plan, planned.facts
        self.parts = build_parts(planned)
        self.plan, self.device = plan, self.parts.device
        self.parts.step.model.train()
        self._epoch = self._batch = self._steps_made = 0
        self._batches: Iterator[Batch] = iter(())
        self._watch = MachineWatch()
        # Loader processes work ahead during the others' turns; this head start must not count.
        self._steps_to_drop = STEPS_TO_WARM_UP_AGAIN + plan.steps_loaded_ahead
        build_seconds = time.perf_counter() - started
        warmup, _ = self._timed(warmup_steps)
        self._steps = steps or max(FEWEST_STEPS, round(seconds / min(warmup)))
        peak_flops, peak_source = peak or measure_peak_flops(
            plan.device, plan.device_name, plan.product_format
        )
        self.facts = VariantFacts(
            device=plan.device,
            device_name=plan.device_name,
            dataset=facts.name,
            train_images=facts.train_images,
            image_size=plan.image_size,
            images_per_step=plan.images_per_step,
            flops_per_image=self.parts.flops_per_image,
            peak_flops=peak_flops,
            peak_flops_source=peak_source,
            plan=plan.as_dict(),
            build_seconds=build_seconds,
            warmup_step_seconds=warmup,
        )

    def sample(self, round_number: int) -> Measurement:
        """Take a sample: warm up again, then time."""
        torch.set_num_threads(self.plan.threads)  # variants may share a process
        dropped, _ = self._timed(self._steps_to_drop)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        graphs = _compiled_graphs()
        self._watch.start()
        started = time.perf_counter()
        step_seconds, images = self._timed(self._steps)
        seconds = time.perf_counter() - started
        load = self._watch.stop()
        memory = peak_memory(self.device)
        if self.device.type == "cuda":
            # Variants in other processes need the memory during their turns.
            torch.cuda.empty_cache()
        return Measurement(
            round=round_number,
            seconds=seconds,
            steps=self._steps,
            images=images,
            step_seconds=step_seconds,
            dropped_step_seconds=dropped,
            cpu_seconds=load.cpu_seconds,
            other_cpu_share=load.other_cpu_share,
            peak_memory_bytes=memory,
            new_graphs=_compiled_graphs() - graphs,
        )

    def start_at(self, epoch: int) -> None:
        """Make the next step the first one of an epoch, counted from 0."""
        self._epoch, self._batch = epoch, 0

    def close(self) -> None:
        """End the loader processes."""
        self.parts.close()

    def optimizer_step(self) -> int:
        """Make one step, as the trainer does. Return the number of its images."""
        plan = self.plan
        if self._batch == plan.batches_per_epoch:
            self._epoch, self._batch = self._epoch + 1, 0
        if self._batch == 0:
            self._batches = self.parts.loaders.train.epoch(self._epoch)
        group = min(plan.accumulate_grad_batches, plan.batches_per_epoch - self._batch)
        image_count = 0
        for position in range(group):
            batch = next(self._batches)
            inputs = self.parts.loaders.train_transform(
                batch,
                step=self._epoch * plan.batches_per_epoch + self._batch,
                epoch=self._epoch,
            )
            images, labels, mixed = inputs
            pair = None if mixed is None else (mixed.other_labels, mixed.lam)
            images, labels, pair = self.parts.select(images, labels, pair)
            self.parts.step.accumulate(
                images,
                labels,
                pair,
                group_size=group,
                last_of_group=position == group - 1,
            )
            image_count += len(batch.labels)
            self._batch += 1
        # Sampling continues past the planned end, where a schedule may be at zero.
        planned_step = self._steps_made % plan.total_steps
        self.parts.step.update(plan.lr * self.parts.schedule(planned_step), step=self._steps_made)
        self._steps_made += 1
        return image_count

    def _timed(self, steps: int) -> tuple[list[float], int]:
        return time_steps(self.optimizer_step, steps, self.device)


def _compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process; its module is loaded on first use."""
    module = sys.modules.get("torch._dynamo.utils")
    return 0 if module is None else int(module.counters["stats"]["unique_graphs"])
