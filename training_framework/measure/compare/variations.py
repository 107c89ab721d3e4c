"""Experiments made from a configuration: one key varied, or each switch off and on in turn."""

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

__all__ = ["SWITCHES", "ablation", "variation"]

# What varying a setting changes by intent in the work that is done.
CHANGED_WORK = {
    "batch_size": ["images_per_step"],
    "accumulate_grad_batches": ["images_per_step"],
    "img_size": ["image_size", "flops"],
    "model": ["flops"],
    "stem": ["flops"],
    "num_classes": ["flops"],
    "data": ["dataset", "image_size", "flops"],
}

# Every switch of the speed or memory of a step: its settings when off and when on.
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixed precision": ({"precision": "32"}, {"precision": "mixed"}),
    "channels_last": ({"channels_last": False}, {"channels_last": True}),
    "compile": ({"compile": False, "compile_mode": None}, {"compile": True}),
    "fused optimizer": ({"fused_optimizer": False}, {"fused_optimizer": True}),
    "small-map convs": ({"small_map_convolutions": False}, {"small_map_convolutions": True}),
    "winograd convs": ({"winograd_convolutions": False}, {"winograd_convolutions": True}),
    "fused norms": ({"fused_norms": False}, {"fused_norms": True}),
    "kept memory": ({"keep_memory": False}, {"keep_memory": True}),
    "resident data": ({"resident_data": False}, {"resident_data": True}),
    "shared weights": ({"share_early_weights": False}, {"share_early_weights": True}),
    "checkpointing": ({"activation_checkpointing": False}, {"activation_checkpointing": True}),
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
                f"--vary {name}: {len(values)} value(s), some equal or too few to compare",
                f"give two or more different values: --vary {name}=A,B",
            )
    if len(set(keys)) < len(keys):
        raise UserError("--vary: a key is given twice", "give all of its values at once")
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
    of them off. `without X` (or `with X`, where the plan leaves X off) is compared with the
    configuration as planned. So each row is one switch away from what it is compared with.

    Args:
        base: Settings that all variants share.
        plan: What they come to on this machine.
        facts: Of their data set.
        **changes: Fields of the experiment.

    Raises:
        UserError: A setting is wrong.
    """
    config = build_config(base)
    switches = {name: pair for name, pair in SWITCHES.items() if _applies(name, config, facts)}
    everything_off = {key: value for off, _ in switches.values() for key, value in off.items()}
    variants: list[dict[str, Any]] = [
        {"name": ALL_OFF, "overrides": everything_off},
        {"name": AS_PLANNED},
    ]
    for name, (off, on) in switches.items():
        needs = ["bf16"] if name == "mixed precision" else []
        key = next(iter(off))
        planned = getattr(plan, key) if hasattr(plan, key) else getattr(config, key)
        word, change = ("with", on) if planned == off[key] else ("without", off)
        variants += [
            {
                "name": f"only {name}",
                "overrides": {**everything_off, **on},
                "against": ALL_OFF,
                "needs": needs,
            },
            {
                "name": f"{word} {name}",
                "overrides": change,
                "against": AS_PLANNED,
                "needs": needs if word == "with" else [],
            },
        ]
    fields = {
        "name": "ablation",
        "description": "Each switch alone, and each off (or on) among the others.",
        "variants": variants,
        "baseline": ALL_OFF,
    }
    return make_experiment({**fields, **changes}, base, source="--ablate")


def _applies(switch: str, config: TrainConfig, facts: DatasetFacts) -> bool:
    """Whether the switch can change anything in this configuration."""
    if switch == "shared weights":
        return config.model in ("resnet10", "resnet18", "resnet34")
    if switch == "resident data":
        return facts.storage == "arrays"
    return True
