"""Changes to a model that keep its parameters, their names and its results.

Each function changes the model in place and returns the number of changed modules; it warns if
there are none. Only the class of a module changes: it stays the same object with the same tensors,
so references to it stay valid. `plain_network` undoes all of these changes.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training_framework.kernels.fused_norm import FusedBatchNorm2d, can_fuse_norm
from training_framework.kernels.norm import load_norm_kernels
from training_framework.kernels.small_maps import SmallMapConv2d, is_small_map
from training_framework.kernels.synchronized_norm import (
    SynchronizedBatchNorm2d,
    TorchSynchronizedBatchNorm2d,
)
from training_framework.kernels.winograd import load_winograd_kernels
from training_framework.kernels.winograd_convolution import (
    Bf16WinogradConv2d,
    WinogradConv2d,
    winograd_applies,
)
from training_framework.models.blocks import ResidualBlock
from training_framework.models.flops import meta_copy

__all__ = [
    "checkpoint_activations",
    "fuse_norms",
    "plain_network",
    "synchronize_norms",
    "use_small_map_convolutions",
    "use_winograd_convolutions",
]

# The torch class of each class that surgery uses.
PLAIN_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    WinogradConv2d: nn.Conv2d,
    SmallMapConv2d: nn.Conv2d,
    FusedBatchNorm2d: nn.BatchNorm2d,
    SynchronizedBatchNorm2d: nn.BatchNorm2d,
    TorchSynchronizedBatchNorm2d: nn.BatchNorm2d,
}
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def plain_network(model: nn.Module) -> nn.Module:
    """Undo all changes of surgery, so that the network consists of torch's own modules again.

    torch.export, torch.jit.trace and ONNX do not know the project's operators, but accept the
    result of this function. The network is changed in place. Parameters, buffers, hooks, names in
    the state dict and memory layout stay; outputs stay the same up to rounding.

    Args:
        model: Any network, changed or not.

    Returns:
        The same network, without the wrappers of torch.compile and DistributedDataParallel.
    """
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        wrapped = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
        assert isinstance(wrapped, nn.Module)
        model = wrapped
    for module in model.modules():
        if type(module) in PLAIN_CLASSES:
            vars(module).pop("process_group", None)
            _turn_into(module, PLAIN_CLASSES[type(module)])
        elif isinstance(module, ResidualBlock):
            module.recompute_activations = False
    return model


def synchronize_norms(model: nn.Module, device_type: str) -> int:
    """Compute the statistics of batch norm over the batches of all processes.

    Call it before wrapping the model in DDP. When to use it: for small batches per process (below
    about 16), or for results that must not depend on the number of processes. Its price: two small
    collectives per norm and step.

    Args:
        model: Its `BatchNorm2d` modules change, but not modules of derived classes.
        device_type: `cuda` uses torch.nn.SyncBatchNorm; all others use `SynchronizedBatchNorm2d`,
            since torch's refuses CPUs.

    Returns:
        Number of norms changed; 0 comes with a warning.
    """
    kind = TorchSynchronizedBatchNorm2d if device_type == "cuda" else SynchronizedBatchNorm2d
    norms = [module for module in model.modules() if type(module) is nn.BatchNorm2d]
    for norm in norms:
        _turn_into(norm, kind)
    _warn_if_none(len(norms), "synchronize_norms: the model has no BatchNorm2d to replace")
    return len(norms)


def fuse_norms(model: nn.Module) -> int:
    """On CPUs, compute batch norm, the shortcut's addition and ReLU in one pass over memory.

    When to use it: for training on a CPU in fp32 and channels_last; measured on CPUs with AVX-512.
    Results stay the same up to rounding, as do the names in the state dict. In other precisions and
    in evaluation, torch's operators run. Its price: the kernels are compiled once on each machine,
    which takes a few seconds and a C++ compiler, and the model can be differentiated only once.

    Args:
        model: Its `BatchNorm2d` modules change, except norms that `synchronize_norms` changed,
            that have hooks, or that occur in several places.

    Returns:
        Number of norms changed; 0 comes with a warning.

    Raises:
        NativeKernelsError: The kernels cannot be compiled here.
    """
    load_norm_kernels()
    norms = [
        module
        for _, module in _changeable(model)
        if isinstance(module, nn.BatchNorm2d) and can_fuse_norm(module)
    ]
    for norm in norms:
        _turn_into(norm, FusedBatchNorm2d)
    _warn_if_none(len(norms), "fuse_norms: the model has no BatchNorm2d that can be fused")
    return len(norms)


def checkpoint_activations(model: nn.Module) -> int:
    """Keep only the inputs of residual blocks, and recompute the rest in the backward pass.

    When to use it: when memory is short. Its price: about one more forward pass per step, a third
    of the work. Losses and gradients stay the same, and batch norm's running statistics are still
    updated once per step (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv
    1604.06174).

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

    When to use it: for training on a CPU with small images and the ImageNet stem, in channels_last.
    Results stay the same up to rounding, as do the names in the state dict. On other devices and
    for other maps, the ordinary convolution runs. Its price: the model can be differentiated only
    once.

    Args:
        model: Its `Conv2d` modules with small maps change, except those that have hooks or occur in
            several places.
        image_size: Side in pixels of the square input images.

    Returns:
        Number of convolutions changed; 0 comes with a warning.
    """
    replaced = _replace_convolutions(model, image_size, is_small_map, SmallMapConv2d)
    _warn_if_none(
        replaced,
        f"use_small_map_convolutions: no convolution has a small map at {image_size} px",
    )
    return replaced


def use_winograd_convolutions(
    model: nn.Module, image_size: int, *, bf16_products: bool = False
) -> int:
    """On CPUs, compute 3x3 convolutions of stride 1 and 2 by Winograd's algorithm.

    When to use it: for training on a CPU in fp32 and channels_last; measured on CPUs with AVX-512.
    Results stay the same up to rounding, as do the names in the state dict. In other precisions,
    the ordinary convolution runs. Its price: the kernels are compiled once on each machine, which
    takes a few seconds and a C++ compiler, and the model can be differentiated only once.

    Args:
        model: Its `Conv2d` modules of that kind change, except those that have hooks or occur in
            several places. To use both, call `use_small_map_convolutions` first.
        image_size: Side in pixels of the square input images.
        bf16_products: Whether to compute the products in bf16; see `Bf16WinogradConv2d`.

    Returns:
        Number of convolutions changed; 0 comes with a warning.

    Raises:
        NativeKernelsError: The kernels cannot be compiled here.
    """
    load_winograd_kernels()
    kind = Bf16WinogradConv2d if bf16_products else WinogradConv2d
    replaced = _replace_convolutions(model, image_size, winograd_applies, kind)
    _warn_if_none(
        replaced,
        f"use_winograd_convolutions: no suitable convolution at {image_size} px",
    )
    return replaced


def _replace_convolutions(
    model: nn.Module,
    image_size: int,
    applies: Callable[[nn.Conv2d, int, int], bool],
    kind: type[nn.Conv2d],
) -> int:
    """Change the convolutions that `applies` accepts at the size of their maps; return how many."""
    try:
        map_sizes = _map_sizes(model, image_size)
    except Exception as error:  # a user's network may raise anything on a meta image
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"the sizes of the network's maps are unknown ({reason}); nothing changed",
            stacklevel=3,
        )
        return 0
    convolutions = [
        module
        for name, module in _changeable(model)
        if type(module) is nn.Conv2d and name in map_sizes and applies(module, *map_sizes[name])
    ]
    for convolution in convolutions:
        _turn_into(convolution, kind)
    return len(convolutions)


def _turn_into(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def _changeable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules whose behaviour depends on nothing but their class.

    A hook may read or change `weight` (as weight_norm, spectral_norm and pruning do), an attribute
    may replace a method, and a module in several places would change in all of them.
    """
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name, module in model.named_modules():
        if places[id(module)] == 1 and not _has_hooks(module):
            kind = type(module)
            if not any(hasattr(kind, attribute) for attribute in vars(module)):
                yield name, module


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in HOOKS)


def _map_sizes(model: nn.Module, image_size: int) -> dict[str, tuple[int, int]]:
    """Height and width of the input of each convolution, by module name."""
    sizes: dict[str, tuple[int, int]] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            height, width = inputs[0].shape[-2:]
            sizes[name] = (height, width)

        return hook

    shapes_only = meta_copy(model).eval()
    for module in shapes_only.modules():
        _drop_hooks_of_users(module)
    for name, module in shapes_only.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(record(name))
    with torch.no_grad():
        shapes_only(torch.empty(1, 3, image_size, image_size, device="meta"))
    return sizes


def _drop_hooks_of_users(module: nn.Module) -> None:
    """Remove a user's hooks, which must not see a trial run; torch's own hooks compute weights."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__module__", "").partition(".")[0] != "torch":
                del hooks[key]


def _warn_if_none(changed: int, message: str) -> None:
    if changed == 0:
        warnings.warn(f"{message}; nothing changed", stacklevel=3)
