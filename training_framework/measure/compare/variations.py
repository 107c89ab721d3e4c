"""Experiments made from a configuration: vary some keys, or turn each switch off and on."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from training_framework.config import TrainConfig
from training_framework.config.inheritance import Setting
from training_framework.config.loading import build_config
from training_framework.config.names import canonical, nearest
from training_framework.data.facts import DatasetFacts
from training_framework.errors import UserError
from training_framework.measure.compare.experiment import Experiment, make_experiment
from training_framework.plan import TrainPlan
from training_framework.switches import SWITCHES

__all__ = ["ablation", "variation"]

# The kinds of work that change on purpose when a setting is varied.
CHANGED_WORK = {
    "batch_size": ["images_per_step"],
    "accumulate_grad_batches": ["images_per_step"],
    "img_size": ["image_size", "flops"],
    "model": ["flops"],
    "stem": ["flops"],
    "num_classes": ["flops"],
    "data": ["dataset", "image_size", "flops"],
}

ALL_OFF = "all off"
AS_PLANNED = "as planned"


def variation(
    base: Mapping[str, Setting], axes: Sequence[tuple[str, Sequence[Any]]], **changes: Any
) -> Experiment:
    """An experiment over all combinations of some keys' values.

    Args:
        base: Settings that all variants share.
        axes: Each key with its values; the first combination is the baseline.
        **changes: Fields of the experiment.

    Raises:
        UserError: A key is unknown, a value is wrong, or nothing varies.
    """
    keys = [canonical(key, None)[0] for key, _ in axes]
    choices = [[canonical(key, value)[1] for value in values] for key, values in axes]
    for (name, values), key in zip(axes, keys, strict=True):
        if key not in TrainConfig.model_fields:
            raise UserError(f"--vary: unknown key {name!r}", nearest(name))
        if len(values) < 2 or any(values.count(value) > 1 for value in values):
            raise UserError(
                f"--vary {name}: {len(values)} value(s): too few, or some are equal",
                f"give two or more different values: --vary {name}=A,B",
            )
    if len(set(keys)) < len(keys):
        raise UserError("--vary: a key is given twice", "give all its values at once")
    variants = [
        {
            "name": ", ".join(
                f"{key}={_plain(value)}" for key, value in zip(keys, values, strict=True)
            ),
            "overrides": dict(zip(keys, values, strict=True)),
        }
        for values in itertools.product(*choices)
    ]
    fields = {
        "name": "vary-" + "-".join(key.replace("_", "-") for key in keys),
        "description": f"The same configuration with {', '.join(keys)} varied.",
        "variants": variants,
        "may_differ": sorted({kind for key in keys for kind in CHANGED_WORK.get(key, [])}),
    }
    return make_experiment({**fields, **changes}, base, source="--vary")


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def ablation(
    base: Mapping[str, Setting], plan: TrainPlan, facts: DatasetFacts, **changes: Any
) -> Experiment:
    """An experiment on every switch, alone and among the others.

    `only X` has X on and every other switch off, and is compared with a configuration that has all
    of them off. `without X` (or `with X`, if the plan leaves X off) is compared with the
    configuration as planned. So each row differs in one switch from the row it is compared with.

    Args:
        base: Settings that all variants share.
        plan: Their plan on this machine.
        facts: Facts about their data set.
        **changes: Fields of the experiment.

    Raises:
        UserError: A setting is wrong.
    """
    config = build_config(base)
    switches = {
        switch: switch.ablation
        for switch in SWITCHES
        if switch.ablation and switch.can_matter(config, facts)
    }
    planned = plan.switch_values()
    everything_off = {key: value for off, _ in switches.values() for key, value in off.items()}
    variants: list[dict[str, Any]] = [
        {"name": ALL_OFF, "overrides": everything_off},
        {"name": AS_PLANNED},
    ]
    for switch, (off, on) in switches.items():
        is_off = planned[switch.key] == off[switch.key]
        word, change = ("with", on) if is_off else ("without", off)
        variants += [
            {
                "name": f"only {switch.name}",
                "overrides": {**everything_off, **on},
                "against": ALL_OFF,
                "needs": switch.ablation_needs,
            },
            {
                "name": f"{word} {switch.name}",
                "overrides": change,
                "against": AS_PLANNED,
                "needs": switch.ablation_needs if is_off else (),
            },
        ]
    fields = {
        "name": "ablation",
        "description": "Each switch alone, and each off (or on) among the others.",
        "variants": variants,
        "baseline": ALL_OFF,
    }
    return make_experiment({**fields, **changes}, base, source="--ablate")
