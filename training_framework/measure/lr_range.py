"""The learning-rate range test: a short training whose rate grows until the loss does.

Source: Smith, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186, section 3.3.
The two rates that are read off the curve are those of fastai's `lr_find`.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from training_framework.config import TrainConfig
from training_framework.data import Batch
from training_framework.errors import UserError
from training_framework.measure.profile.run_parts import build_profiled_parts
from training_framework.runs.directory import write_json
from training_framework.training.parts import Parts

__all__ = ["LrRange", "measure_lr_range", "plot_lr_range", "write_lr_range"]

FEWEST_STEPS = 20
# The loss of single batches is noisy: each smoothed value is mostly that of the ten before it.
KEPT_SHARE = 0.9
# Beyond this multiple of the least loss the training has diverged.
DIVERGED = 4.0


@dataclass(frozen=True, kw_only=True)
class LrRange:
    """A finished test.

    Attributes:
        rates: Learning rate of each step.
        losses: Training loss of each step.
        smoothed: Moving average of the losses.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]

    @property
    def steepest(self) -> float:
        """The rate at which the smoothed loss falls fastest, by the logarithm of the rate."""
        falls = [after - before for before, after in itertools.pairwise(self.smoothed)]
        return self.rates[1 + falls.index(min(falls))]

    @property
    def tenth_of_least(self) -> float:
        """A tenth of the rate with the least smoothed loss."""
        return self.rates[self.smoothed.index(min(self.smoothed))] / 10

    @property
    def suggestion(self) -> float:
        """A peak rate to start from: between the two rates above, in the logarithm."""
        return math.sqrt(self.steepest * self.tenth_of_least)


def measure_lr_range(
    config: TrainConfig,
    *,
    lowest: float = 1e-5,
    highest: float = 10.0,
    steps: int = 100,
    say: Callable[[str], None] = lambda line: None,
) -> LrRange:
    """Train with a rate that grows by the same factor in each step. Nothing is saved.

    Args:
        config: What to train; its own rate and schedule are not used.
        lowest: Rate of the first step.
        highest: Rate of the last step, unless the loss diverges before.
        steps: Optimizer steps, at least 20.
        say: Shows a line to the user.

    Raises:
        UserError: The range or the number of steps makes no sense, or a setting is wrong.
    """
    if not (0 < lowest < highest and math.isfinite(highest)):
        raise UserError(
            f"lr-range: {lowest:g} to {highest:g} is no range", "give --from below --to, above 0"
        )
    if steps < FEWEST_STEPS:
        raise UserError(f"lr-range: {steps} steps are too few", f"give --steps {FEWEST_STEPS}")
    parts = build_profiled_parts(config, command="lr-range")
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    say(f"{steps} steps from a rate of {lowest:g} to {highest:g}")
    try:
        groups = _groups(parts)
        for step in range(steps):
            rate = lowest * (highest / lowest) ** (step / (steps - 1))
            loss = _train(parts, next(groups), rate, step)
            average = KEPT_SHARE * average + (1 - KEPT_SHARE) * loss
            value = average / (1 - KEPT_SHARE ** (step + 1))
            if not math.isfinite(value) or (smoothed and value > DIVERGED * min(smoothed)):
                break
            rates.append(rate)
            losses.append(loss)
            smoothed.append(value)
    finally:
        parts.close()
    if len(rates) < FEWEST_STEPS // 2:
        raise UserError(
            f"lr-range: the loss diverged after {len(rates)} steps", "give a smaller --from"
        )
    return LrRange(rates=tuple(rates), losses=tuple(losses), smoothed=tuple(smoothed))


def _groups(parts: Parts) -> Iterator[list[tuple[int, int, Batch]]]:
    """The batches of one step after the other, each with its epoch and its number in the run."""
    plan = parts.plan
    for epoch in itertools.count():
        numbered = enumerate(parts.loaders.train.epoch(epoch), epoch * plan.batches_per_epoch)
        batches = ((epoch, number, batch) for number, batch in numbered)
        while group := list(itertools.islice(batches, plan.accumulate_grad_batches)):
            yield group


def _train(parts: Parts, group: Sequence[tuple[int, int, Batch]], rate: float, step: int) -> float:
    """One optimizer step; its mean loss."""
    parts.step.model.train()
    total = 0.0
    for position, (epoch, number, batch) in enumerate(group):
        inputs = parts.loaders.train_transform(batch, step=number, epoch=epoch)
        images, labels, mixed = inputs
        pair = None if mixed is None else (mixed.other_labels, mixed.lam)
        images, labels, pair = parts.select(images, labels, pair)
        loss = parts.step.accumulate(
            images,
            labels,
            pair,
            group_size=len(group),
            last_of_group=position == len(group) - 1,
        )
        total += loss.item()
    parts.step.update(rate, step=step)
    return total / len(group)


def write_lr_range(found: LrRange, path: Path, *, command: str) -> None:
    """Write the curve and what is read off it as JSON."""
    values = {
        "command": command,
        "suggestion": found.suggestion,
        "steepest": found.steepest,
        "tenth_of_least": found.tenth_of_least,
        **asdict(found),
    }
    write_json(path, values)


def plot_lr_range(found: LrRange, path: Path, *, title: str) -> None:
    """Draw loss over rate, with the rates that are read off it, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.plot(found.rates, found.losses, color="#9db8d2", linewidth=0.8, label="each step")
    axes.plot(found.rates, found.smoothed, color="#1f6db5", label="moving average")
    for rate, name, line in (
        (found.steepest, "steepest fall", ":"),
        (found.tenth_of_least, "a tenth of the rate of the lowest loss", "--"),
        (found.suggestion, "suggestion", "-"),
    ):
        axes.axvline(rate, color="#c2410c", linestyle=line, label=f"{name}: {rate:.2g}")
    # Before it diverges, the loss of a single batch may already be far above the others.
    axes.set_ylim(0, 1.5 * max(found.smoothed))
    axes.set(xlabel="learning rate", ylabel="training loss", title=title)
    axes.legend()
    figure.savefig(path)
