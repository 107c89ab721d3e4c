"""Changes to a model that keep its parameters, their names and what it computes.

Each function changes the model in place and returns how many modules it changed; where that is
none, it warns.
"""

import warnings

from torch import nn

from training_framework.models.blocks import ResidualBlock
from training_framework.models.synchronized_norm import SynchronizedBatchNorm2d

__all__ = ["checkpoint_activations", "synchronize_norms"]


def synchronize_norms(model: nn.Module, device_type: str) -> int:
    """Let batch norm take its statistics over the batches of all processes, not of its own alone.

    Call it before the model is wrapped in DDP. When to use it: small batches per process (below
    about 16), or results that must not depend on the number of processes. Its price: two small
    collectives a norm and step.

    Args:
        model: Its `BatchNorm2d` modules are replaced, except where the model itself is one.
        device_type: `cuda` takes torch.nn.SyncBatchNorm; every other device takes
            `SynchronizedBatchNorm2d`, since torch's refuses CPUs.

    Returns:
        Number of norms replaced; 0 comes with a warning.
    """
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.BatchNorm2d:
                continue
            if device_type == "cuda":
                norm: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(child)
            else:
                norm = SynchronizedBatchNorm2d.from_batch_norm(child)
            setattr(parent, name, norm)
            replaced += 1
    _warn_if_none(replaced, "synchronize_norms: the model has no BatchNorm2d to replace")
    return replaced


def checkpoint_activations(model: nn.Module) -> int:
    """Keep only the inputs of residual blocks, and compute the rest again in the backward pass.

    When to use it: memory is short. Its price: about one more forward pass a step, a third of the
    work. Losses and gradients stay the same, and batch norm's running statistics are still updated
    once a step (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174).

    Returns:
        Number of residual blocks changed; 0 comes with a warning.
    """
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    for block in blocks:
        block.recompute_activations = True
    _warn_if_none(len(blocks), "checkpoint_activations: the model has no residual blocks")
    return len(blocks)


def _warn_if_none(changed: int, message: str) -> None:
    if changed == 0:
        warnings.warn(f"{message}; nothing changed", stacklevel=3)
