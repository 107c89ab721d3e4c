"""Divide a batch into parts that fit in memory."""

from torch import Tensor

from training_framework.training.loss import MixedWith

__all__ = ["even_parts"]


def even_parts(
    images: Tensor, labels: Tensor, mixed: MixedWith | None, *, most: int | None
) -> list[tuple[Tensor, Tensor, MixedWith | None]]:
    """The batch, in as few even parts as possible.

    Args:
        images: (N, C, H, W).
        labels: (N,).
        mixed: The other labels and the share, if images were mixed.
        most: Maximum images of a part; None: no limit.
    """
    if most is None or len(labels) <= most:
        return [(images, labels, mixed)]
    count = -(-len(labels) // most)
    parts = zip(images.tensor_split(count), labels.tensor_split(count), strict=True)
    if mixed is None:
        return [(*part, None) for part in parts]
    others = mixed[0].tensor_split(count)
    return [(*part, (other, mixed[1])) for part, other in zip(parts, others, strict=True)]
