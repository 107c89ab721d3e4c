"""Other names for the same setting, and the nearest name for a mistyped one."""

import difflib
from collections.abc import Iterable
from typing import Any

from training_framework.config.schema import TrainConfig

__all__ = ["ALIASES", "canonical", "nearest"]

# Alias -> key. Both are read everywhere; two that contradict each other are an error.
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
    """The key that `name` stands for, and the value in that key's terms.

    `use_amp` is a yes or no for `precision`; every other alias has its key's own values.
    A name that is no alias comes back as it is.
    """
    if name == "use_amp" and isinstance(value, bool):
        return "precision", "mixed" if value else "32"
    return ALIASES.get(name, name), value


def nearest(name: str, valid: Iterable[str] | None = None) -> str:
    """What to suggest for an unknown name: the nearest valid one, or where the list stands."""
    names = list(valid) if valid is not None else [*TrainConfig.model_fields, *ALIASES]
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else "`efficient-resnet train --help` lists all"
