"""The phases of a step, for whoever measures them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

__all__ = ["EnterPhase", "Phase", "untimed"]

Phase = Literal["data", "transform", "forward", "backward", "optimizer", "logging"]
EnterPhase = Callable[[Phase], AbstractContextManager[object]]

_NO_CONTEXT = nullcontext()


def untimed(phase: Phase) -> AbstractContextManager[object]:
    """A phase that is not measured."""
    return _NO_CONTEXT
