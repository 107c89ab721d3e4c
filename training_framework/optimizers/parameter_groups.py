"""Choose the parameters that weight decay applies to."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from training_framework.optimizers.rates import TrainedFor

__all__ = ["parameter_groups"]

# _NormBase is the base of every batch norm (lazy and synchronized ones too) and instance norm.
_NORM_TYPES = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# Norms of other libraries that derive from none of them: LayerNorm2d, FrozenBatchNorm2d.
_NORM_CLASS_NAME = re.compile(r"Norm(\dd)?$")


class _Kind(NamedTuple):
    """What the parameters of a group have in common; groups are sorted by it."""

    is_other: bool  # no convolution, if those are separate
    is_exempt: bool  # from weight decay
    lr_factor: float = 1.0
    trained_for: TrainedFor | None = None


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    decay_norm_and_bias: bool = False,
    bias_lr_factor: float = 1.0,
    trained_for: Mapping[nn.Parameter, TrainedFor] = MappingProxyType({}),
    separate_convolutions: bool = False,
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
        bias_lr_factor: Learning rate of norms and biases, as a multiple of the others'.
        trained_for: Parameters that are not trained to the end.
        separate_convolutions: Whether the weights of convolutions have groups of their own, before
            the others and with `is_convolution`.

    Returns:
        Groups, none of them empty, each in the model's order: decayed, then not decayed. Where
        parameters differ in more, there are more groups, with more keys; see `set_rates`. An empty
        list if nothing is trainable.
    """
    groups: dict[_Kind, list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            is_bias = _is_norm(module) or _is_bias(name)
            kind = _Kind(
                not (separate_convolutions and isinstance(module, nn.Conv2d) and name == "weight"),
                is_bias and not decay_norm_and_bias,
                bias_lr_factor if is_bias else 1.0,
                trained_for.get(parameter),
            )
            groups.setdefault(kind, []).append(parameter)
    result = []
    for kind in sorted(groups, key=lambda kind: (*kind[:3], kind.trained_for or ())):
        group = {"params": groups[kind], "weight_decay": 0.0 if kind.is_exempt else weight_decay}
        if kind.lr_factor != 1:
            group["lr_factor"] = kind.lr_factor
        if kind.trained_for is not None:
            # Plain values, since a checkpoint holds them.
            group["trained_steps"], group["then_freezes"] = kind.trained_for
        if not kind.is_other:
            group["is_convolution"] = True
        result.append(group)
    return result


def _is_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    return isinstance(module, _NORM_TYPES) or _NORM_CLASS_NAME.search(name) is not None


def _is_bias(name: str) -> bool:
    # `bias`, but also attention's `in_proj_bias` and a recurrent net's `bias_ih_l0`.
    return "bias" in name.split("_")
