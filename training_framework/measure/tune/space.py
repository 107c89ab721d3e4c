"""What `tune` varies for one configuration on one machine."""

from collections.abc import Iterator, Sequence

from training_framework.config import TrainConfig
from training_framework.config.names import nearest
from training_framework.data.facts import DatasetFacts
from training_framework.errors import UserError
from training_framework.machine.hardware import Hardware
from training_framework.measure.tune.search import Dimension
from training_framework.plan import TrainPlan
from training_framework.switches import SWITCHES, Situation, Trial
from training_framework.switches.methods import SMALLEST_TRIED_BATCH

__all__ = ["tuning_space"]

BATCH = "batch"
# What tends to gain most comes first, so that short searches reach it; then the entries' order.
TRIED_FIRST = ("precision", BATCH, "compile", "loading")


def tuning_space(
    config: TrainConfig,
    plan: TrainPlan,
    hardware: Hardware,
    facts: DatasetFacts,
    *,
    allow_batch_change: bool = False,
    keep: Sequence[str] = (),
) -> list[Dimension]:
    """The dimensions, each starting with the plan's own choice; any without another are left out.

    Args:
        config: What is tuned.
        plan: Its plan on this machine.
        hardware: The machine.
        facts: Facts about the data set.
        allow_batch_change: Also try other numbers of images for an optimizer step.
        keep: Keys of the configuration that stay as they are.

    Raises:
        UserError: A key to keep is unknown.
    """
    for key in keep:
        if key not in TrainConfig.model_fields:
            raise UserError(f"--keep: unknown key {key!r}", nearest(key))
    situation = Situation(
        config=config,
        hardware=hardware,
        facts=facts,
        accelerators=() if plan.device == "cpu" else hardware.usable,
        world_size=plan.world_size,
        local_world_size=plan.world_size,
        total_steps=plan.total_steps,
        stem=plan.stem,
        own_network=plan.own_network is not None,
        chosen=plan.switch_values(),
    )
    found: dict[str, list[Trial]] = {name: [] for name in TRIED_FIRST}
    for switch in SWITCHES:
        found.setdefault(switch.dimension, []).extend(switch.trials(situation))
    if allow_batch_change:
        found[BATCH].extend(_other_batches(config, facts))
    dimensions = []
    for name, trials in found.items():
        allowed = [
            (trial.name, trial.settings) for trial in trials if not {*trial.settings} & {*keep}
        ]
        if allowed:
            dimensions.append(Dimension(name=name, values=(("as planned", {}), *allowed)))
    return dimensions


def _other_batches(config: TrainConfig, facts: DatasetFacts) -> Iterator[Trial]:
    images_per_step = config.batch_size * config.accumulate_grad_batches
    for batch in (images_per_step // 2, 2 * images_per_step, 4 * images_per_step):
        if SMALLEST_TRIED_BATCH <= batch <= facts.train_images:
            yield Trial(
                f"batch {batch}, not {images_per_step}, a step",
                {"batch_size": batch, "accumulate_grad_batches": 1},
            )
