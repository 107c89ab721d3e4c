"""Tries a user's own network once, before a run writes anything."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from training_framework.errors import UserError, shown
from training_framework.machine.randomness import (
    random_states,
    restore_random_states,
    seed_everything,
)

__all__ = ["check_is_network", "class_of", "try_user_network"]

_SIGNATURE = "let forward take float images (N, 3, H, W) and return scores (N, classes)"


def check_is_network(network: object) -> None:
    """Refuse what is not a PyTorch network, or is wrapped for several processes.

    Raises:
        UserError: It is one of these.
    """
    if not isinstance(network, nn.Module):
        kind = "class" if isinstance(network, type) else type(network).__name__
        raise UserError(f"network is a {kind}", "give an instance of a torch.nn.Module")
    if isinstance(network, (DataParallel, DistributedDataParallel)):
        raise UserError(
            f"network is wrapped in {type(network).__name__}",
            "give network.module; torchrun starts several processes",
        )


def try_user_network(
    network: nn.Module, images: Tensor, *, num_classes: int, seed: int, will_be_copied: bool
) -> None:
    """Run a network once in training mode and once in evaluation mode, to find what would fail.

    Its buffers, modes and gradients stay as they were, and so do the global generators. Lazy
    modules get their parameters, drawn from `seed`.

    Args:
        network: From (N, 3, H, W) float images to (N, num_classes) scores, on any device.
        images: A few of them, fp32.
        num_classes: Classes of the data.
        seed: Of the run.
        will_be_copied: Whether the run keeps a weight average, a deep copy.

    Raises:
        UserError: It cannot be trained.
    """
    _refuse_meta(network)
    tensor = next((t for t in (*network.parameters(), *network.buffers())), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    images = images.to(device)
    random = random_states(device)
    try:
        seed_everything(seed)
        if any(is_lazy(tensor) for tensor in (*network.parameters(), *network.buffers())):
            with _left_as_it_is(network):
                _scores(network, images, training=False)
        _check_parameters(network)
        with _left_as_it_is(network):
            # Evaluation comes last: it leaves tensors without a gradient in the modules. Tensors
            # with one could not be copied.
            for training in (True, False):
                scores = _scores(network, images, training=training)
                _check_scores(network, scores, len(images), num_classes, training=training)
    finally:
        restore_random_states(random, device)
    if will_be_copied:
        try:
            copy.deepcopy(network)
        except Exception as error:  # user code may raise anything
            raise UserError(
                f"{_named(network)} cannot be copied: {_reason(error)}",
                "fix that, or set ema_decay to 0",
            ) from error


def _refuse_meta(network: nn.Module) -> None:
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_meta:
            raise UserError(
                f"{_named(network)}: {name} is on the meta device and has no values",
                "call network.to_empty(device='cpu') and initialize or load its weights",
            )


def _check_parameters(network: nn.Module) -> None:
    trainable = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    if not trainable:
        raise UserError(
            f"{_named(network)} has no trainable parameter",
            "set requires_grad of some parameters to True",
        )
    for name, parameter in trainable:
        if parameter.dtype != torch.float32:
            raise UserError(
                f"{_named(network)}: {name} is {parameter.dtype}",
                "call network.float(): weights are kept in fp32, and precision (bf16-mixed, "
                "16-mixed) says what is computed in",
            )


@contextlib.contextmanager
def _left_as_it_is(network: nn.Module) -> Iterator[None]:
    """Restore modes and buffers at the end."""
    modes = [(module, module.training) for module in network.modules()]
    places = [
        (module, name, buffer)
        for module in network.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if not is_lazy(buffer)
    ]
    values = [buffer.clone() for _, _, buffer in places]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for (module, name, buffer), value in zip(places, values, strict=True):
            # A scripted module returns a new object for the same buffer each time.
            if not isinstance(module, torch.jit.ScriptModule):
                setattr(module, name, buffer)
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


def _scores(network: nn.Module, images: Tensor, *, training: bool) -> Any:
    network.train(training)
    try:
        with torch.set_grad_enabled(training):
            return network(images)
    except Exception as error:  # user code may raise anything
        mode = "training" if training else "evaluation"
        raise UserError(
            f"{_named(network)} fails in {mode} mode on images of shape {tuple(images.shape)}: "
            f"{_reason(error)}",
            _SIGNATURE,
        ) from error


def _check_scores(
    network: nn.Module, scores: Any, image_count: int, num_classes: int, *, training: bool
) -> None:
    mode = "training" if training else "evaluation"
    if not isinstance(scores, Tensor):
        what, expression = _parts_of(scores)
        raise UserError(
            f"{_named(network)} returns {what} in {mode} mode, not one tensor of scores",
            f"wrap it in a module whose forward returns {expression}, or build it without "
            "auxiliary outputs",
        )
    shape = tuple(scores.shape)
    if len(shape) != 2 or shape[0] != image_count or not scores.is_floating_point():
        raise UserError(
            f"{_named(network)} returns {scores.dtype} of shape {shape} for {image_count} images",
            "return float scores (N, classes)",
        )
    if shape[1] != num_classes:
        raise UserError(
            f"{_named(network)} returns {shape[1]} scores an image, but there are {num_classes} "
            "classes",
            f"give its last layer {num_classes} outputs, or set num_classes",
        )
    if training and not scores.requires_grad:
        raise UserError(
            f"{_named(network)} returns scores without a gradient",
            "drop no_grad, inference_mode or detach from its forward",
        )


def _parts_of(value: Any) -> tuple[str, str]:
    """What a network returned, in words, and an expression for its scores."""
    kind = f"a {type(value).__name__}"
    if hasattr(value, "logits"):
        return f"{kind} with logits", "network(images).logits"
    if isinstance(value, Mapping):
        key = next((key for key in ("logits", "scores", "out") if key in value), None)
        expression = "its scores" if key is None else f"network(images)[{key!r}]"
        return f"{kind} with the keys {shown(list(value))}", expression
    if isinstance(value, (tuple, list)):
        return f"{kind} of {len(value)}", "network(images)[0]"
    return kind, "its scores"


def class_of(network: nn.Module) -> str:
    """Name of a network's class; for a scripted network, the class that it was made from."""
    name = getattr(network, "original_name", None)
    return name if isinstance(name, str) else type(network).__name__


def _named(network: nn.Module) -> str:
    return f"the network ({class_of(network)})"


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
