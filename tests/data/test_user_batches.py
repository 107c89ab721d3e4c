from collections import UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from training_framework.data.user_batches import IMAGE_KEYS, LABEL_KEYS, as_floats, checked_batch
from training_framework.errors import UserError

PIXELS = torch.randint(0, 256, (4, 3, 5, 6), generator=torch.Generator().manual_seed(0))
FLOATS = PIXELS / 255
LABELS = torch.tensor([0, 2, 1, 2])
Pair = namedtuple("Pair", "picture kind")


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def made_in_inference_mode() -> torch.Tensor:
    with torch.inference_mode():
        return FLOATS + 0


@pytest.mark.parametrize(
    "item",
    [
        (FLOATS, LABELS),
        [FLOATS, LABELS],
        [FLOATS, LABELS, ["a", "b", "c", "d"]],
        Pair(FLOATS, LABELS),
        *[{key: FLOATS, "labels": LABELS, "path": "a"} for key in IMAGE_KEYS],
        *[UserDict({"image": FLOATS, key: LABELS}) for key in LABEL_KEYS],
        (FLOATS.double(), LABELS.int()),
        (PIXELS.byte(), LABELS.byte()),
        (FLOATS, LABELS.unsqueeze(1)),
        (FLOATS, LABELS.to(torch.uint16)),
        (FLOATS, LABELS.tolist()),
        (FLOATS.numpy(), LABELS.numpy()),
        (PIXELS.byte().numpy(), LABELS.numpy().astype(">i2")),
        (read_only(FLOATS.numpy().copy()), read_only(LABELS.numpy().copy())),
        (np.flip(FLOATS.flip(3).numpy(), 3), LABELS.numpy()[:, None]),
        (FLOATS.clone().requires_grad_(), LABELS),
        (made_in_inference_mode(), LABELS),
        (torch.nn.Parameter(FLOATS), LABELS),
    ],
)
def test_every_usual_kind_of_batch_is_taken(item: Any) -> None:
    images, labels = checked_batch(item, "batch 0", num_classes=3)
    assert torch.allclose(as_floats(images), FLOATS, atol=1e-7)
    assert as_floats(images).dtype == torch.float32
    assert type(images) is torch.Tensor
    assert not images.requires_grad
    assert not images.is_inference()
    assert labels.dtype == torch.int64
    assert torch.equal(labels, LABELS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_become_floats(dtype: torch.dtype) -> None:
    images, _ = checked_batch((FLOATS.to(dtype), LABELS), "batch 0", num_classes=3)
    assert torch.equal(as_floats(images), FLOATS.to(dtype).float())


def test_labels_are_a_copy() -> None:
    own = LABELS.clone()
    _, labels = checked_batch((FLOATS, own), "batch 0", num_classes=3)
    own.zero_()
    assert torch.equal(labels, LABELS)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            {"picture": FLOATS, "labels": LABELS},
            r"keys \['picture', 'labels'\]; name the keys images",
        ),
        ((FLOATS[:0], LABELS[:0]), "is empty; remove it from the loader"),
        ((FLOATS, torch.eye(3)[LABELS]), r"labels have shape \(4, 3\); .*argmax"),
        ((FLOATS, LABELS.float()), "labels are torch.float32"),
        ((FLOATS, LABELS.to(torch.complex64)), "labels are torch.complex64"),
        ((FLOATS, ["cat", "dog", "cat", "dog"]), "contains Tensor and list"),
        ((FLOATS.to_sparse(), LABELS), "images are not a plain tensor"),
        ((FLOATS.to("meta"), LABELS), "images are not a plain tensor"),
        ((PIXELS, LABELS), "images are torch.int64; yield normalized floats, or uint8"),
        ((np.array(["a", "b"]), LABELS), "contains an array of <U1"),
        ((FLOATS.permute(0, 2, 3, 1), LABELS), r"shape \(4, 5, 6, 3\); yield \(N, 3, H, W\)"),
        (([FLOATS[0], FLOATS[1]], LABELS), "contains list and Tensor"),
        (FLOATS, r"is a Tensor; yield \(images, labels\)"),
        (None, r"is a NoneType; yield \(images, labels\)"),
    ],
)
def test_everything_else_is_one_line(item: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^batch 3.*{message}") as caught:
        checked_batch(item, "batch 3", num_classes=3)
    assert "\n" not in str(caught.value)
