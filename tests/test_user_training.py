"""Training on users' loaders and networks of many kinds, against a plain loop of PyTorch."""

import copy
import json
import os
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from training_framework.errors import UserError
from training_framework.machine.randomness import seed_everything
from training_framework.runs import record
from training_framework.train import EfficientResNet18Trainer

CLASSES, SIZE, SEED = 3, 8, 4
PLAIN = {
    "num_classes": CLASSES, "epochs": 1, "lr": 0.05, "momentum": 0.0, "weight_decay": 0.0,
    "scheduler": "constant", "warmup_steps": 0, "precision": "32", "accelerator": "cpu",
    "threads": 1, "tensorboard": False, "seed": SEED, "channels_last": False, "compile": False,
    "label_smoothing": 0.0,
}  # fmt: skip
LONG = bool(os.environ.get("LONG_TESTS"))
BOUNDED = settings(
    max_examples=500 if LONG else 20,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
Pair = namedtuple("Pair", "images labels")


@pytest.fixture(autouse=True)
def _no_measurement(monkeypatch: pytest.MonkeyPatch, in_tmp_path: Path) -> None:
    """The machine's speed is not the subject here, and measuring it takes most of a tiny run."""
    monkeypatch.setattr(record, "measure_peak_flops", lambda *_: (1e11, "table"))


def trainer(network: nn.Module | None, **overrides: Any) -> EfficientResNet18Trainer:
    return EfficientResNet18Trainer(network=network, **{**PLAIN, **overrides})


class Normed(nn.Module):
    """With batch norm, dropout, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(3 * SIZE * SIZE, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        twice = self.stem(self.norm(self.stem(images)).relu())
        scores: Tensor = self.head(self.dropout(twice.flatten(1)))
        return scores


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES))


def half_frozen() -> nn.Module:
    network = Normed()
    network.stem.requires_grad_(False)
    return network


def lazy() -> nn.Module:
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear, "normed": Normed, "half_frozen": half_frozen, "lazy": lazy,
}  # fmt: skip


class Samples(Dataset[Any]):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


class Streamed(IterableDataset[Any]):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(self.images, self.labels, strict=True))


class Once:
    """An iterator with a length, which draws what it augments with."""

    def __init__(self, batches: list[Any]) -> None:
        self.length, self.batches = len(batches), iter(batches)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> "Once":
        return self

    def __next__(self) -> Any:
        images, labels = next(self.batches)
        if isinstance(images, Tensor) and images.is_floating_point():
            images = images + torch.rand(()).to(images.dtype)
        return images, labels


def as_dicts(loader: DataLoader[Any]) -> DataLoader[Any]:
    def collate(samples: list[Any]) -> dict[str, Tensor]:
        images, labels = torch.utils.data.default_collate(samples)
        return {"pixel_values": images, "labels": labels}

    return DataLoader(loader.dataset, loader.batch_size, collate_fn=collate)


def batches_of(images: Tensor, labels: Tensor, size: int) -> list[Any]:
    return list(zip(images.split(size), labels.split(size), strict=True))


LOADERS: dict[str, Callable[[Tensor, Tensor, int], Any]] = {
    "list": batches_of,
    "tuple": lambda *data: tuple(batches_of(*data)),
    "named tuples": lambda *data: [Pair(*batch) for batch in batches_of(*data)],
    "once": lambda *data: Once(batches_of(*data)),
    "shuffled": lambda images, labels, size: DataLoader(
        Samples(images, labels), size, shuffle=True
    ),
    "dicts": lambda images, labels, size: as_dicts(DataLoader(Samples(images, labels), size)),
    "streamed": lambda images, labels, size: DataLoader(Streamed(images, labels), size),
}  # fmt: skip
ARRAYS = ("list", "tuple", "once")


@st.composite
def data_of(draw: st.DrawFn) -> tuple[str, Callable[[], Any]]:
    """A kind of loader, and what makes one of fixed content."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    size = draw(st.integers(2, 5))
    count = size + draw(st.integers(2, size))  # two batches
    labels = torch.randint(CLASSES, (count,), generator=generator)
    pixels = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator)
    kind = draw(st.sampled_from(sorted(LOADERS)))
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16", "float64", "uint8"]))
    images = pixels.byte() if dtype == "uint8" else (pixels / 255).to(getattr(torch, dtype))
    labels = labels.to(
        draw(st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.int16, torch.int8]))
    )
    if draw(st.booleans()):
        labels = labels.unsqueeze(1)
    arrays = kind in ARRAYS and dtype != "bfloat16" and draw(st.booleans())

    def make() -> Any:
        if not arrays:
            return LOADERS[kind](images, labels, size)
        return LOADERS[kind](*(data.numpy() for data in (images, labels)), size)  # type: ignore

    if arrays:
        numpy_batches = [tuple(t.numpy() for t in b) for b in batches_of(images, labels, size)]
        makers = {"list": list, "tuple": tuple, "once": Once}
        return f"{kind} {dtype}", lambda: makers[kind](list(numpy_batches))
    return f"{kind} {dtype}", make


def plain_loop(network: nn.Module, loader: Any) -> None:
    """What a user would write."""
    seed_everything(SEED)
    network.train()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.05)
    for batch in loader:
        images, labels = batch.values() if isinstance(batch, dict) else batch
        images, labels = torch.as_tensor(images), torch.as_tensor(labels)
        images = images / 255 if images.dtype == torch.uint8 else images.float()
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels.long().flatten()).backward()
        optimizer.step()


def initialized(network: nn.Module) -> nn.Module:
    """Lazy modules draw from the run's seed."""
    seed_everything(SEED)
    with torch.no_grad():
        network.eval()(torch.zeros(2, 3, SIZE, SIZE))
    return network


@BOUNDED
@given(data=data_of(), kind=st.sampled_from(sorted(NETWORKS)), seed=st.integers(0, 9))
def test_a_users_loader_and_network_train_as_in_a_plain_loop(
    data: tuple[str, Callable[[], Any]], kind: str, seed: int
) -> None:
    torch.manual_seed(seed)
    network = NETWORKS[kind]()
    theirs = initialized(copy.deepcopy(network))
    ours = trainer(network)
    assert ours.train(data[1]()).steps == 2
    assert ours.model is network
    plain_loop(theirs, data[1]())
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-4, atol=1e-6)
