"""Aliases of settings, and the nearest valid name for a mistyped one."""

import difflib
from collections.abc import Iterable
from typing import Any

from training_framework.config.schema import TrainConfig

__all__ = ["ALIASES", "canonical", "nearest"]

# Alias -> key. Both are accepted everywhere; giving both with different values is an error.
ALIASES = {
    "max_epochs": "epochs",
    "learning_rate": "lr",
    "image_size": "img_size",
    "workers": "num_workers",
    "use_amp": "precision",
    "use_torch_compile": "compile",
    "gradient_clip_val": "grad_clip_val",
    "gradient_accumulation_steps": "accumulate_grad_batches",
}


def canonical(name: str, value: Any) -> tuple[str, Any]:
    """The key that `name` means, and the value in that key's terms.

    `use_amp` is a yes or no for `precision`; every other alias takes the same values as its key.
    A name that is not an alias is returned unchanged.
    """
    if name == "use_amp" and isinstance(value, bool):
        return "precision", "mixed" if value else "32"
    return ALIASES.get(name, name), value


def nearest(name: str, valid: Iterable[str] | None = None) -> str:
    """The suggestion for an unknown name: the nearest valid one, or where to find them all."""
    names = list(valid) if valid is not None else [*TrainConfig.model_fields, *ALIASES]
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return (
        f"did you mean {match[0]!r}?" if match else "`efficient-resnet train --help` lists them all"
    )
