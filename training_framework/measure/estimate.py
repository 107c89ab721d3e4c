"""How long a whole run will take here, from a few of its steps and evaluation batches."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from training_framework.config import TrainConfig
from training_framework.data import Batch, Loader
from training_framework.errors import UserError
from training_framework.measure.compare.timing import StepSampler
from training_framework.plan import TrainPlan
from training_framework.training.evaluation import evaluate
from training_framework.training.parts import Parts

__all__ = ["RunEstimate", "StepTime", "estimate_run", "step_time"]

BLOCKS = 6
# Student's t for 95% with BLOCKS - 1 degrees of freedom.
T_OF_BLOCKS = 2.571
WARM_UP_STEPS = 5
EVALUATED_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The time of a step at one image size.

    Attributes:
        image_size: Side of the training images in pixels.
        steps: Steps of the run at this size.
        seconds: Mean time of a step.
        error: Half of its 95% interval, in seconds.
    """

    image_size: int
    steps: float
    seconds: float
    error: float


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """What a whole run will take. Writing checkpoints and logs is not counted.

    Attributes:
        plan: Of the run.
        step_times: One for each image size.
        start_seconds: Building everything and compiling, as measured.
        evaluations: Evaluations of the run.
        evaluation_seconds: Time of one of them; 0 without a validation set.
        memory_bytes: Peak of the device or, on a CPU, of this process.
        other_cpu_share: Share of the CPU that other programs used meanwhile.
    """

    plan: TrainPlan
    step_times: tuple[StepTime, ...]
    start_seconds: float
    evaluations: int
    evaluation_seconds: float
    memory_bytes: int
    other_cpu_share: float

    @property
    def seconds(self) -> float:
        """Wall time of the run."""
        steps = sum(time.steps * time.seconds for time in self.step_times)
        return self.start_seconds + steps + self.evaluations * self.evaluation_seconds

    @property
    def error_seconds(self) -> float:
        """Half of the 95% interval of `seconds`, from how much the steps differed."""
        return math.sqrt(sum((time.steps * time.error) ** 2 for time in self.step_times))


def step_time(seconds: Sequence[float], *, image_size: int, steps: float) -> StepTime:
    """The mean of measured steps, with an interval that allows for slow drifts.

    Steps that follow one another are alike, so the interval comes from the means of six blocks
    (batch means; Law and Kelton, Simulation Modeling and Analysis, section 9.5.3).

    Args:
        seconds: Of consecutive steps, at least 12.
        image_size: Of their images.
        steps: Steps of the run at this size.
    """
    means = [float(block.mean()) for block in np.array_split(np.asarray(seconds), BLOCKS)]
    error = T_OF_BLOCKS * float(np.std(means, ddof=1)) / math.sqrt(BLOCKS)
    mean = float(np.mean(seconds))
    return StepTime(image_size=image_size, steps=steps, seconds=mean, error=error)


def estimate_run(config: TrainConfig, *, steps: int = 30) -> RunEstimate:
    """Measure some steps at each image size, and a part of an evaluation. Nothing is saved.

    Args:
        config: The run.
        steps: Steps to time at each size, at least 12.

    Raises:
        UserError: There are too few steps, or a setting is wrong.
    """
    if steps < 2 * BLOCKS:
        raise UserError(
            f"estimate: {steps} steps are too few", f"give --steps {2 * BLOCKS} or more"
        )
    sampler = StepSampler(
        config, steps=steps, seconds=0, warmup_steps=WARM_UP_STEPS, peak=(0.0, "not asked")
    )
    try:
        plan, facts = sampler.plan, sampler.facts
        times, memory, others = [], 0, 0.0
        for epoch, size, share in _sizes(plan):
            sampler.start_at(epoch)
            sample = sampler.sample(0)
            times.append(
                step_time(sample.step_seconds, image_size=size, steps=share * plan.total_steps)
            )
            memory = max(memory, sample.peak_memory_bytes)
            others = max(others, sample.other_cpu_share)
        return RunEstimate(
            plan=plan,
            step_times=tuple(times),
            start_seconds=facts.build_seconds + sum(facts.warmup_step_seconds),
            evaluations=sum(plan.evaluates_after(step) for step in range(1, plan.total_steps + 1)),
            evaluation_seconds=_evaluation_seconds(sampler.parts),
            memory_bytes=memory,
            other_cpu_share=others,
        )
    finally:
        sampler.close()


def _sizes(plan: TrainPlan) -> list[tuple[int, int, float]]:
    """Each image size: its first epoch, its side in pixels, and its share of the run's steps."""
    if plan.resolutions is None:
        return [(0, plan.image_size, 1.0)]
    lengths = plan.resolutions.by_epoch(plan.epochs)
    whole = sum(length for length, _ in lengths)
    first: dict[int, int] = {}
    shares: dict[int, float] = {}
    for epoch, (length, size) in enumerate(lengths):
        first.setdefault(size, epoch)
        shares[size] = shares.get(size, 0.0) + length / whole
    return [(first[size], size, share) for size, share in shares.items()]


class _FirstBatches:
    """The first batches of a loader."""

    def __init__(self, loader: Loader, count: int) -> None:
        self.batch_count = min(count, loader.batch_count)
        self._loader = loader

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """They come from a new pass each time."""
        return islice(self._loader.epoch(epoch, start_batch), self.batch_count)

    def close(self) -> None:
        """Close the loader itself."""
        self._loader.close()


def _evaluation_seconds(parts: Parts) -> float:
    """Time of an evaluation of the whole validation set; 0 without one."""
    loader, plan = parts.loaders.val, parts.plan
    if loader is None:
        return 0.0
    seconds, images = 0.0, 1
    for count in (1, EVALUATED_BATCHES):  # the first pass starts workers and warms the shape up
        found = evaluate(
            parts.evaluated,
            _FirstBatches(loader, count),
            parts.loaders.eval_transform,
            device=parts.device,
            num_classes=plan.num_classes,
            precision=plan.precision,
            tta=plan.tta,
        )
        seconds, images = found.seconds, found.metrics.count
    of_average = (
        plan.recompute_norm_batches * plan.global_batch_size if plan.averages_weights else 0
    )
    return seconds / images * (parts.planned.facts.val_images + of_average)
