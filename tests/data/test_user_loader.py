from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from training_framework.data.user_loader import UserLoader
from training_framework.errors import UserError


def _dataset() -> TensorDataset:
    return TensorDataset(torch.randn(10, 3, 4, 4), torch.arange(10) % 5)


def test_batches_of_a_data_loader_come_through() -> None:
    dataset = _dataset()
    loader = UserLoader(DataLoader(dataset, batch_size=4), device="cpu", num_classes=5)
    batches = list(loader.epoch(0))
    assert loader.batch_count == len(batches) == 3
    assert torch.equal(torch.cat([batch.images for batch in batches]), dataset.tensors[0])
    assert torch.equal(torch.cat([batch.labels for batch in batches]), dataset.tensors[1])
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(10))


def test_start_batch_passes_over_the_first_batches() -> None:
    loader = UserLoader(DataLoader(_dataset(), batch_size=4), device="cpu")
    assert [batch.indices.tolist() for batch in loader.epoch(0, start_batch=2)] == [[8, 9]]


def test_epoch_reaches_the_distributed_sampler() -> None:
    sampler = DistributedSampler(_dataset(), num_replicas=2, rank=0)
    list(UserLoader(DataLoader(_dataset(), sampler=sampler), device="cpu").epoch(7))
    assert sampler.epoch == 7


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            {"image": torch.zeros(2, 3, 4, 4)},
            "is a dict with the keys .*image.*name the keys images and labels",
        ),
        ((torch.zeros(2, 3, 4, 4),), "is a tuple"),
        (([1, 2], torch.zeros(2)), "contains list and Tensor"),
        ((torch.zeros(2, 3, 4, 4).int(), torch.zeros(2).long()), "images are torch.int32"),
        ((torch.zeros(2, 1, 4, 4), torch.zeros(2).long()), r"shape \(2, 1, 4, 4\)"),
        ((torch.zeros(2, 4, 4), torch.zeros(2).long()), r"shape \(2, 4, 4\)"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(2)), "labels are torch.float32"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(3).long()), r"of shape \(3,\)"),
        ((torch.zeros(2, 3, 4, 4), torch.tensor([1, 5])), r"label 5 is not in 0\.\.4"),
        ((torch.zeros(2, 3, 4, 4), torch.tensor([-1, 1])), "label -1 is not in"),
    ],
)
def test_wrong_batches_are_errors_that_name_the_batch(item: Any, message: str) -> None:
    good = (torch.zeros(2, 3, 4, 4), torch.tensor([0, 4]))
    loader = UserLoader([good, item], device="cpu", num_classes=5)
    batches = loader.epoch(0)
    next(batches)
    with pytest.raises(UserError, match=f"batch 1 of the list.*{message}"):
        next(batches)


def test_loader_without_a_length_is_an_error() -> None:
    with pytest.raises(UserError, match="generator has no length"):
        UserLoader((item for item in ()), device="cpu")


def test_doubles_become_floats_and_small_integers_longs() -> None:
    item = (torch.zeros(2, 3, 4, 4).double(), torch.tensor([0, 1], dtype=torch.int32))
    (batch,) = UserLoader([item], device="cpu").epoch(0)
    assert batch.images.dtype == torch.float32
    assert batch.labels.dtype == torch.int64
