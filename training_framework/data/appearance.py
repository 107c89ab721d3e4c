"""Random changes of how training images look: color jitter, TrivialAugment and RandAugment."""

from dataclasses import dataclass

from torch import Tensor

from training_framework.data.auto_augment import AutoAugment, augment
from training_framework.data.color_jitter import color_jitter

__all__ = ["Appearance"]

_DRAWS_OF_JITTER = 3
_DRAWS_OF_OPERATION = 3


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """Which changes a training image gets, in this order.

    Attributes:
        color_jitter: Strength of color jitter; 0: off.
        auto_augment: `trivial`: one operation of a random level; `rand`: `operations` of them, all
            of the same level.
        operations: Operations of `rand`.
        magnitude: Level of `rand`, 0 to 30.
    """

    color_jitter: float = 0.0
    auto_augment: AutoAugment = "none"
    operations: int = 2
    magnitude: int = 9

    @property
    def draws_per_sample(self) -> int:
        """Draws that `__call__` needs for each image."""
        if self.auto_augment == "none":
            return _DRAWS_OF_JITTER if self.color_jitter else 0
        # Jitter keeps its rows where it is off, so that turning it on changes no other draw.
        return _DRAWS_OF_JITTER + _DRAWS_OF_OPERATION * self._operations

    @property
    def _operations(self) -> int:
        return 1 if self.auto_augment == "trivial" else self.operations

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change a batch.

        Args:
            images: (N, 3, H, W) uint8.
            draws: (draws_per_sample, N) uniform in [0, 1).
        """
        if self.color_jitter:
            images = color_jitter(images, draws[:_DRAWS_OF_JITTER], self.color_jitter)
        if self.auto_augment != "none":
            rows = draws[_DRAWS_OF_JITTER:].split(_DRAWS_OF_OPERATION)
            for own in rows[: self._operations]:
                images = augment(images, own, self.auto_augment, magnitude=self.magnitude)
        return images
