"""Reduce maps without aliasing."""

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BlurPool"]


class BlurPool(nn.Module):
    """Blurs by [1, 2, 1] / 4 in both directions and keeps every second pixel.

    Reflected at the border, as in Zhang, "Making Convolutional Networks Shift-Invariant Again",
    arXiv 1904.11486. The filter is two averages of neighbouring pixels in a row, which need no
    weights: [1, 1] / 2 twice.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, ceil(H / 2), ceil(W / 2))."""
        # A single pixel has no other to reflect.
        mode = "reflect" if min(x.shape[2:]) > 1 else "replicate"
        padded = functional.pad(x, (1, 1, 1, 1), mode=mode)
        return functional.avg_pool2d(functional.avg_pool2d(padded, 2, stride=1), 2, stride=2)
