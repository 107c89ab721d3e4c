"""A forward pass through torch.compile, which runs eagerly if it cannot be compiled."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training_framework.errors import UserError, one_line

__all__ = ["CompiledForward"]

Forward = Callable[..., tuple[Tensor, Tensor]]


def _warn(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=2)


class CompiledForward:
    """Calls a compiled forward pass; after the first failure to compile, the eager one.

    Args:
        forward: From images, labels and mixed labels to logits and loss.
        mode: torch.compile's mode.
        is_required: Whether a failure to compile is an error.

    Attributes:
        replays_graphs: Whether its outputs are in memory that the next call overwrites.
        report: Shows a line to the user; a warning, unless set.
    """

    def __init__(self, forward: Forward, mode: str, is_required: bool) -> None:
        self.replays_graphs = mode in ("reduce-overhead", "max-autotune")
        self._eager = forward
        self._forward: Forward = torch.compile(forward, mode=mode)
        self._is_required = is_required
        self.report: Callable[[str], None] = _warn

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Logits and loss.

        Raises:
            UserError: It cannot be compiled, and compiling is required.
        """
        try:
            return self._forward(*arguments)
        except RuntimeError as error:
            # Imported by torch.compile, and slow to import without it.
            from torch._dynamo.exc import TorchDynamoException

            if not isinstance(error, TorchDynamoException):
                raise
            cause = getattr(error, "inner_exception", error)
            reason = one_line(f"{type(cause).__name__}: {cause}".partition("\n")[0])
            fault = f"the training step cannot be compiled: {reason}"
            if self._is_required:
                raise UserError(f"compile: {fault}", "set compile to false") from error
        self.report(f"note: {fault}; it runs without torch.compile")
        self._forward, self.replays_graphs = self._eager, False
        return self._eager(*arguments)
