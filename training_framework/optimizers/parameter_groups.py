"""Choose the parameters that weight decay applies to."""

import re
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["parameter_groups"]

# _NormBase is the base of every batch norm (lazy and synchronized ones too) and instance norm.
_NORM_TYPES = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# Norms of other libraries that derive from none of them: LayerNorm2d, FrozenBatchNorm2d.
_NORM_CLASS_NAME = re.compile(r"Norm(\dd)?$")


def parameter_groups(
    model: nn.Module, *, weight_decay: float, decay_norm_and_bias: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: weight decay, but not on norms and biases.

    Larger scales and shifts of norms or larger biases do not make the function more complex, and
    pulling them to zero costs accuracy (He et al., arXiv 1812.01187, section 3.1). They are
    recognized by the type of their module and by their name. The usual shortcut, "one dimension or
    fewer", is wrong both ways: a norm's scale may have three dimensions (LayerNorm over C, H and
    W), and a vector may be an ordinary weight (PReLU's slopes, a layer scale).

    Every trainable parameter is in exactly one group. For one that several modules share, its first
    place in the model decides. Frozen parameters (requires_grad False) are in none.

    Args:
        model: The network; wrapped (DDP, torch.compile) or not.
        weight_decay: Weight decay of the decayed parameters.
        decay_norm_and_bias: Decay norms and biases too.

    Returns:
        One or two groups, none of them empty, in the model's order: decayed, then not decayed.
        An empty list if nothing is trainable.
    """
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            exempt = not decay_norm_and_bias and (_is_norm(module) or _is_bias(name))
            (not_decayed if exempt else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    return isinstance(module, _NORM_TYPES) or _NORM_CLASS_NAME.search(name) is not None


def _is_bias(name: str) -> bool:
    # `bias`, but also attention's `in_proj_bias` and a recurrent net's `bias_ih_l0`.
    return "bias" in name.split("_")
