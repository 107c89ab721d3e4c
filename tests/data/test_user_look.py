import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from training_framework.data.user_facts import user_loader_facts
from training_framework.data.user_loader import UserLoader
from training_framework.data.user_look import look_at
from training_framework.errors import UserError
from training_framework.machine.randomness import seed_everything

IMAGES = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10) % 3
BATCHES = list(zip(IMAGES.split(4), LABELS.split(4), strict=True))


def look(loader: Any, *, several_passes: bool = False, role: str = "training") -> Any:
    return look_at(loader, role=role, seed=0, several_passes=several_passes)


def labels_of(loader: UserLoader, epoch: int = 0, start_batch: int = 0) -> list[list[int]]:
    return [batch.labels.tolist() for batch in loader.epoch(epoch, start_batch)]


class Once:
    """An iterator with a length, which cannot begin anew."""

    def __init__(self) -> None:
        self.batches = iter(BATCHES)

    def __len__(self) -> int:
        return len(BATCHES)

    def __iter__(self) -> "Once":
        return self

    def __next__(self) -> Any:
        return next(self.batches)


class HoldsGenerator(Once):
    def __init__(self) -> None:
        self.batches = (batch for batch in BATCHES)

    def __iter__(self) -> Any:
        return self.batches


class Rewinds(Once):
    """An iterator that `iter` sets back to its first batch."""

    def __iter__(self) -> "Rewinds":
        self.batches = iter(BATCHES)
        return self


class HiddenStream(Once):
    """Each iteration goes on where the one before ended, which cannot be seen."""

    def __iter__(self) -> Any:
        return (batch for batch in self.batches)


class Samples(IterableDataset[Any]):
    def __len__(self) -> int:
        return len(IMAGES)

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(IMAGES, LABELS, strict=True))


class NoLength(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(BATCHES)


class Stream(Samples):
    def __init__(self) -> None:
        self.samples = iter(zip(IMAGES, LABELS, strict=True))

    def __iter__(self) -> Iterator[Any]:
        return self.samples


class Indexed(Dataset[Any]):
    """Counts which samples are read, and draws from generators of its own."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.numpy = np.random.default_rng(0)
        self.python = random.Random(0)
        self.torch = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        noise = self.numpy.random() + self.python.random()
        return IMAGES[index] + noise + torch.rand((), generator=self.torch), int(LABELS[index])


@pytest.mark.parametrize(
    "make",
    [
        lambda: BATCHES,
        lambda: tuple(BATCHES),
        Once,
        HoldsGenerator,
        Rewinds,
        HiddenStream,
        lambda: DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4),
        lambda: DataLoader(Samples(), batch_size=4),
        lambda: DataLoader(Stream(), batch_size=4),
        lambda: DataLoader(Samples(), batch_size=4, num_workers=1, persistent_workers=True),
    ],
)
def test_the_batch_that_is_looked_at_is_trained_on(make: Any) -> None:
    looked = look(make())
    assert looked.batch_count == 3
    assert looked.batch_size == 4
    assert torch.equal(looked.images, IMAGES[:2])
    loader = UserLoader(looked, device="cpu")
    assert labels_of(loader) == [labels.tolist() for _, labels in BATCHES]


@pytest.mark.parametrize("make", [Once, HoldsGenerator, HiddenStream, lambda: BATCHES])
def test_a_resumed_epoch_passes_over_the_first_batches_of_any_kind(make: Any) -> None:
    first = UserLoader(look(make()), device="cpu")
    assert len(labels_of(first)) == 3
    again = UserLoader(look(make()), device="cpu")
    again.load_state_dict(first.state_dict())
    assert labels_of(again, start_batch=2) == [[2, 0]]


@pytest.mark.parametrize("make", [Once, HoldsGenerator])
def test_what_can_be_iterated_once_is_refused_for_more(make: Any) -> None:
    loader = make()
    with pytest.raises(UserError, match=r"training .* iterated only once.*set epochs to 1"):
        look(loader, several_passes=True)
    assert len(list(loader)) == 3, "nothing of it is lost"


@pytest.mark.parametrize("make", [Rewinds, lambda: BATCHES])
def test_what_begins_anew_serves_several_epochs(make: Any) -> None:
    loader = UserLoader(look(make(), several_passes=True), device="cpu")
    assert labels_of(loader, 0) == labels_of(loader, 1)


def test_a_hidden_stream_that_is_used_up_is_named() -> None:
    loader = UserLoader(look(HiddenStream()), device="cpu")
    labels_of(loader)
    with pytest.raises(UserError, match="training HiddenStream yields no batch in epoch 1"):
        labels_of(loader, 1)


def test_one_batch_is_read_and_no_generator_is_moved() -> None:
    def shuffled() -> tuple[Indexed, DataLoader[Any]]:
        data, draws = Indexed(), torch.Generator().manual_seed(5)
        sampler = RandomSampler(data, generator=draws)
        return data, DataLoader(data, batch_size=4, sampler=sampler)

    torch.manual_seed(9), np.random.seed(9), random.seed(9)  # noqa: NPY002
    data, loader = shuffled()
    looked = look(loader)
    assert len(data.read) == 4
    state = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(9), np.random.seed(9), random.seed(9)  # noqa: NPY002
    assert state == (torch.rand(1), np.random.rand(), random.random())  # noqa: NPY002
    ours = [batch.images for batch in UserLoader(looked, device="cpu").epoch(0)]
    _, untouched = shuffled()
    theirs = [images for images, _ in untouched]
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


class Draws(Once):
    """A stream that draws from the global generator."""

    def __init__(self) -> None:
        self.batches = ((torch.rand(2, 3, 4, 4), torch.tensor([0, 1])) for _ in range(3))


@pytest.mark.parametrize(
    "make", [Draws, lambda: DataLoader(TensorDataset(IMAGES, LABELS), 4, shuffle=True)]
)
def test_the_draws_of_a_loader_are_those_of_a_plain_loop(make: Any) -> None:
    """Dropout between the batches draws too, and draws the same."""
    looked = look(make())
    seed_everything(0)
    ours = [(batch.images, torch.rand(1)) for batch in UserLoader(looked, device="cpu").epoch(0)]
    seed_everything(0)
    theirs = [(images, torch.rand(1)) for images, _ in make()]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_workers_are_started_for_one_batch_and_end() -> None:
    loader = DataLoader(
        TensorDataset(IMAGES, LABELS), batch_size=4, num_workers=2, persistent_workers=True
    )
    looked = look(loader)
    assert loader._iterator is None
    assert labels_of(UserLoader(looked, device="cpu")) == [labels.tolist() for _, labels in BATCHES]


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (iter(BATCHES), "list_iterator has no length; pass a loader whose len"),
        ((batch for batch in BATCHES), "generator has no length"),
        (DataLoader(NoLength()), "DataLoader has no length"),
        ([], "training list is empty"),
        (type("Count", (), {"__len__": lambda self: 3})(), "training Count cannot be iterated"),
        (
            type("Lies", (), {"__len__": lambda self: 3, "__iter__": lambda self: iter(())})(),
            "training Lies yields no batch, but its length is 3",
        ),
        ([(IMAGES[:0], LABELS[:0])], "batch 0 of the training list is empty"),
        (TensorDataset(IMAGES, LABELS), "batch 0 of the training TensorDataset"),
    ],
)
def test_what_cannot_be_looked_at_is_one_line(loader: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        look(loader)
    assert "\n" not in str(caught.value)


def test_an_empty_validation_loader_is_refused() -> None:
    with pytest.raises(UserError, match=r"validation list is empty.*or pass no val_loader"):
        look([], role="validation")


def test_facts_count_classes_where_the_data_tells() -> None:
    data = TensorDataset(IMAGES, LABELS)
    facts = user_loader_facts(look(DataLoader(data, batch_size=4)), look(BATCHES), None)
    assert (facts.num_classes, facts.image_size) == (3, 4)
    assert (facts.train_images, facts.val_images) == (10, 12)
    part = torch.utils.data.Subset(data, [0, 1])
    assert user_loader_facts(look(DataLoader(part)), None, None).num_classes == 3


def test_facts_ask_for_the_classes_where_it_does_not() -> None:
    looked = look(BATCHES)
    with pytest.raises(UserError, match="does not tell its number of classes"):
        user_loader_facts(looked, None, None)
    assert user_loader_facts(looked, None, 7).num_classes == 7
