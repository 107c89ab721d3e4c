"""Changes to a model that keep its parameters, their names and what it computes.

Each function changes the model in place and returns how many modules it changed; where that is
none, it warns.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from training_framework.kernels.fused_norm import FusedBatchNorm2d, can_fuse_norm
from training_framework.kernels.norm import load_norm_kernels
from training_framework.kernels.replaced_convolution import ReplacedConv2d
from training_framework.kernels.small_maps import SmallMapConv2d, is_small_map
from training_framework.kernels.synchronized_norm import SynchronizedBatchNorm2d
from training_framework.kernels.winograd import load_winograd_kernels
from training_framework.kernels.winograd_convolution import WinogradConv2d, winograd_applies
from training_framework.models.blocks import ResidualBlock
from training_framework.models.flops import meta_copy

__all__ = [
    "checkpoint_activations",
    "fuse_norms",
    "synchronize_norms",
    "use_small_map_convolutions",
    "use_winograd_convolutions",
]


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


def fuse_norms(model: nn.Module) -> int:
    """On CPUs, compute batch norm, the shortcut's addition and ReLU in one pass over memory.

    When to use it: training on a CPU in fp32 and channels_last; what is measured is a CPU with
    AVX-512. What it computes stays the same up to rounding, and so do the names in the state dict;
    in other precisions and in evaluation torch's operators run. Its price: the kernels are
    compiled once on each machine, which takes a few seconds and a C++ compiler, and the model can
    be differentiated only once.

    Args:
        model: Its `BatchNorm2d` modules are replaced, except where the model itself is one. Norms
            that `synchronize_norms` replaced are left alone.

    Returns:
        Number of norms replaced; 0 comes with a warning.

    Raises:
        NativeKernelsError: The kernels cannot be compiled here.
    """
    load_norm_kernels()
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and can_fuse_norm(child):
                setattr(parent, name, FusedBatchNorm2d.from_batch_norm(child))
                replaced += 1
    _warn_if_none(replaced, "fuse_norms: the model has no BatchNorm2d that can be fused")
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


def use_small_map_convolutions(model: nn.Module, image_size: int) -> int:
    """On CPUs, compute convolutions over maps of a few pixels as matrix products.

    When to use it: training on a CPU with small pictures and the ImageNet stem, in channels_last.
    What it computes stays the same up to rounding, and so do the names in the state dict; on other
    devices and for other maps the ordinary convolution runs. Its price: the model can be
    differentiated only once.

    Args:
        model: Its `Conv2d` modules that see small maps are replaced.
        image_size: Side in pixels of the square images it is to be used with.

    Returns:
        Number of convolutions replaced; 0 comes with a warning.
    """
    replaced = _replace_convolutions(model, image_size, is_small_map, SmallMapConv2d)
    _warn_if_none(
        replaced,
        f"use_small_map_convolutions: no convolution sees a small map at {image_size} px",
    )
    return replaced


def use_winograd_convolutions(model: nn.Module, image_size: int) -> int:
    """On CPUs, compute 3x3 convolutions of stride 1 and 2 by Winograd's algorithm.

    When to use it: training on a CPU in fp32 and channels_last; what is measured is a CPU with
    AVX-512. What it computes stays the same up to rounding, and so do the names in the state dict;
    in other precisions the ordinary convolution runs. Its price: the kernels are
    compiled once on each machine, which takes a few seconds and a C++ compiler, and the model can
    be differentiated only once.

    Args:
        model: Its `Conv2d` modules of that kind are replaced; call `use_small_map_convolutions`
            first, where both are wanted.
        image_size: Side in pixels of the square images it is to be used with.

    Returns:
        Number of convolutions replaced; 0 comes with a warning.

    Raises:
        NativeKernelsError: The kernels cannot be compiled here.
    """
    load_winograd_kernels()
    replaced = _replace_convolutions(model, image_size, winograd_applies, WinogradConv2d)
    _warn_if_none(
        replaced,
        f"use_winograd_convolutions: no convolution is one for it at {image_size} px",
    )
    return replaced


def _replace_convolutions(
    model: nn.Module,
    image_size: int,
    applies: Callable[[nn.Conv2d, int, int], bool],
    kind: type[ReplacedConv2d],
) -> int:
    """Replace the convolutions for which `applies` holds with the size of their maps; how many."""
    map_sizes = _map_sizes(model, image_size)
    replaced = 0
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            map_size = map_sizes.get(f"{parent_name}.{name}" if parent_name else name)
            if type(child) is nn.Conv2d and map_size and applies(child, *map_size):
                setattr(parent, name, kind.from_convolution(child))
                replaced += 1
    return replaced


def _map_sizes(model: nn.Module, image_size: int) -> dict[str, tuple[int, int]]:
    """Height and width of each convolution's input, by module name."""
    sizes: dict[str, tuple[int, int]] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            height, width = inputs[0].shape[-2:]
            sizes[name] = (height, width)

        return hook

    shapes_only = meta_copy(model).eval()
    for name, module in shapes_only.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(record(name))
    with torch.no_grad():
        shapes_only(torch.empty(1, 3, image_size, image_size, device="meta"))
    return sizes


def _warn_if_none(changed: int, message: str) -> None:
    if changed == 0:
        warnings.warn(f"{message}; nothing changed", stacklevel=3)
