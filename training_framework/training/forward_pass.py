"""The forward pass of a training step: logits and loss."""

from torch import Tensor, nn

from training_framework.machine.precision import Precision, autocast, compute_dtype
from training_framework.training.loss import MixedWith, classification_loss
from training_framework.training.master_weights import MasterWeights

__all__ = ["ForwardPass"]


class ForwardPass:
    """Computes logits and loss.

    Args:
        model: The network itself, not wrapped in DDP.
        device_type: `cpu`, `cuda`, ...
        precision: What it computes in; weights stay in fp32.
        label_smoothing: Label smoothing of the loss, 0 to 1.
        master_weights: Whether the weights are cast together; only in mixed precision.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device_type: str,
        precision: Precision,
        label_smoothing: float,
        master_weights: bool = False,
    ) -> None:
        self._network = MasterWeights(model, compute_dtype(precision)) if master_weights else model
        self._device_type = device_type
        self._precision: Precision = precision
        self._smoothing = label_smoothing

    def __call__(
        self, images: Tensor, labels: Tensor, mixed: MixedWith | None
    ) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) images and (N,) labels to (N, classes) logits and the mean loss."""
        with autocast(self._device_type, self._precision):
            logits = self._network(images)
        loss = classification_loss(logits, labels, label_smoothing=self._smoothing, mixed=mixed)
        return logits, loss
