"""Turn the batches of a user's own loader into images and labels."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training_framework.errors import UserError, shown

__all__ = ["IMAGE_KEYS", "LABEL_KEYS", "as_floats", "check_range", "checked_batch"]

# If a batch has several of these keys, the first one in this order counts.
IMAGE_KEYS = ("pixel_values", "images", "image", "imgs", "img", "inputs", "input", "x")
LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def checked_batch(
    item: Any,
    where: str,
    *,
    num_classes: int | None,
    channels: int = 3,
    may_wait: bool = True,
) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch, each a plain tensor.

    Args:
        item: A tuple or list that starts with images and labels, or a mapping with one key of
            IMAGE_KEYS and one of LABEL_KEYS; tensors or NumPy arrays.
        where: Name of the batch in errors.
        num_classes: Labels must be below it; None: they are not checked.
        channels: Channels that the images must have.
        may_wait: Whether to check labels on an accelerator too, which waits for it.

    Returns:
        Images (N, channels, H, W), of any float type or uint8, and labels (N,) int64. The labels
        are a copy, since a loader may reuse its tensor before they are counted.

    Raises:
        UserError: The batch is empty or contains something else.
    """
    images, labels = _images_and_labels(item, where)
    if not (isinstance(images, Tensor) and isinstance(labels, Tensor)):
        raise UserError(
            f"{where} contains {type(images).__name__} and {type(labels).__name__}",
            "yield two tensors, as a DataLoader with its default collate_fn does",
        )
    images, labels = _plain(images, "images", where), _plain(labels, "labels", where)
    _check_images(images, where, channels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.ndim == 2 and len(labels) == len(images):
        raise UserError(
            f"{where}: the labels have shape {tuple(labels.shape)}",
            "yield one class number per image: labels.argmax(dim=1) if they are one-hot",
        )
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise UserError(
            f"{where}: the labels are {labels.dtype} of shape {tuple(labels.shape)}",
            f"yield {len(images)} integers",
        )
    labels = labels.to(torch.int64, copy=True)
    if num_classes is not None and (may_wait or labels.device.type == "cpu"):
        check_range(labels, where, num_classes)
    return images, labels


def as_floats(images: Tensor) -> Tensor:
    """Images in fp32: uint8 is divided by 255, so 0 to 1; floats are only cast."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _images_and_labels(item: Any, where: str) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        found = [
            next((item[key] for key in keys if key in item), None)
            for keys in (IMAGE_KEYS, LABEL_KEYS)
        ]
        if any(value is None for value in found):
            raise UserError(
                f"{where} is a {type(item).__name__} with the keys {shown(list(item))}",
                "name the keys images and labels, or yield (images, labels) by a collate_fn",
            )
    elif isinstance(item, (tuple, list)) and len(item) >= 2:
        found = [item[0], item[1]]
    else:
        raise UserError(f"{where} is a {type(item).__name__}", "yield (images, labels)")
    images, labels = (_from_array(value, where) for value in found)
    if isinstance(labels, (tuple, list)) and all(isinstance(label, int) for label in labels):
        labels = torch.tensor(labels, dtype=torch.int64)
    return images, labels


def _from_array(value: Any, where: str) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    try:
        # torch supports neither swapped byte orders nor negative strides, and warns about read-only
        # arrays.
        return torch.from_numpy(
            np.require(value, value.dtype.newbyteorder("="), requirements=["C", "W"])
        )
    except TypeError:
        raise UserError(
            f"{where} contains an array of {value.dtype}", "yield float images and integer labels"
        ) from None


def _plain(tensor: Tensor, role: str, where: str) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        raise UserError(
            f"{where}: the {role} are not a plain tensor", "yield dense tensors with data"
        )
    if tensor.is_inference():  # autograd refuses tensors made under inference_mode
        tensor = tensor.clone()
    return tensor.detach().as_subclass(Tensor)


def _check_images(images: Tensor, where: str, channels: int) -> None:
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise UserError(
            f"{where}: the images are {images.dtype}",
            "yield normalized floats, or uint8, which is divided by 255",
        )
    if images.ndim != 4 or images.shape[1] != channels:
        raise UserError(
            f"{where}: the images have shape {tuple(images.shape)}", f"yield (N, {channels}, H, W)"
        )
    if images.numel() == 0:
        raise UserError(f"{where} is empty", "remove it from the loader and from its length")


def check_range(labels: Tensor, where: str, num_classes: int) -> None:
    """Refuse labels outside the classes. Waits for their device.

    Raises:
        UserError: A label, (N,) int64, is not in 0..num_classes - 1.
    """
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(
            f"{where}: label {int(wrong[0])} is not in 0..{num_classes - 1}",
            "number the classes from 0, or set num_classes",
        )
