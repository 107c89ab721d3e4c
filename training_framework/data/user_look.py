"""Check the first batch of a user's own loader before training, without losing it."""

import copy
import functools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from training_framework.data.user_batches import as_floats, checked_batch
from training_framework.errors import UserError
from training_framework.machine.randomness import (
    random_states,
    restore_random_states,
    seed_everything,
)

__all__ = [
    "Begun",
    "LookedAtLoader",
    "batch_count",
    "generator_states",
    "look_at",
    "own_generators",
    "same_states",
]

_CPU = torch.device("cpu")
_START_ANEW = "make every iter() of it start from the beginning, as a list or a DataLoader does"


class Begun(NamedTuple):
    """An iteration whose first batch has been checked.

    Attributes:
        items: Its batches, from the first one on.
        before: The states of the generators before it started.
        after: Their states after the first batch.
        is_only: Whether the loader cannot be iterated again.
    """

    items: Iterator[Any]
    before: dict[str, Any]
    after: dict[str, Any]
    is_only: bool


@dataclass(kw_only=True)
class LookedAtLoader:
    """A user's own loader whose first batch is known.

    Attributes:
        loader: The user's loader.
        name: Its name in messages.
        batch_count: Its length.
        batch_size: Images of the first batch.
        images: Up to two images of the first batch, (N, 3, H, W) fp32.
        labels: All labels of the first batch, (N,) int64.
        begun: The iteration to continue first; None if the loader simply starts again.
    """

    loader: Iterable[Any]
    name: str
    batch_count: int
    batch_size: int
    images: Tensor
    labels: Tensor
    begun: Begun | None

    def __len__(self) -> int:
        return self.batch_count


def batch_count(loader: object) -> int:
    """Batches of a user's own loader.

    Raises:
        UserError: The loader has no length.
    """
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        raise UserError(
            f"the {type(loader).__name__} has no length",
            "pass a loader whose len() is its number of batches",
        ) from None


def look_at(loader: Iterable[Any], *, role: str, seed: int, several_passes: bool) -> LookedAtLoader:
    """Load the first batch of a user's loader and nothing else.

    No batch is lost. If the loader may not be able to start again, its iteration is kept, to be
    trained on. If it can, its own generators are reset.

    Args:
        loader: Yields batches as `checked_batch` takes them, and has a length.
        role: `training` or `validation`, for messages.
        seed: Seed of the run: the loader draws the same from the global generators here as at the
            start of a run with that seed. The caller's generators are restored.
        several_passes: Whether the loader will be iterated more than once.

    Raises:
        UserError: The loader has no length or no batch, can be iterated only once although several
            passes are needed, or does not yield images and labels.
    """
    name = f"{role} {type(loader).__name__}"
    count = batch_count(loader)
    if count == 0:
        raise UserError(
            f"the {name} is empty: its length is 0",
            "give it batches" + (", or pass no val_loader" if role == "validation" else ""),
        )
    users_states = random_states(_CPU)
    seed_everything(seed)
    before, reset = generator_states(loader, _CPU), _remembered(loader)
    try:
        items, is_only = _iteration(loader, name, several_passes=several_passes)
        try:
            first = next(items)
        except StopIteration:
            raise UserError(
                f"the {name} yields no batch, but its length is {count}", _START_ANEW
            ) from None
        images, labels = checked_batch(first, f"batch 0 of the {name}", num_classes=None)
        after = generator_states(loader, _CPU)
        begun = None
        if is_only or _may_be_stream(loader, role, before, after):
            begun = Begun(_continued(first, items), before, after, is_only)
        else:
            reset()
    finally:
        restore_random_states(users_states, _CPU)
    return LookedAtLoader(
        loader=loader,
        name=name,
        batch_count=count,
        batch_size=len(images),
        images=as_floats(images[:2]),
        labels=labels,
        begun=begun,
    )


def _continued(first: Any, items: Iterator[Any]) -> Iterator[Any]:
    yield first
    # A `for` would call iter(), which restarts some iterators.
    sentinel = object()
    while (item := next(items, sentinel)) is not sentinel:
        yield item


def own_generators(loader: Any) -> list[torch.Generator]:
    """The torch generators given to a loader or its samplers, each once."""
    found = (getattr(owner, "generator", None) for owner in _with_samplers(loader))
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


def _with_samplers(loader: Any) -> list[Any]:
    batches = getattr(loader, "batch_sampler", None)
    return [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]


def generator_states(loader: Any, device: torch.device) -> dict[str, Any]:
    """States of the global generators and of the loader's own."""
    return {
        "global": random_states(device),
        "own": [generator.get_state() for generator in own_generators(loader)],
    }


def _iteration(
    loader: Iterable[Any], name: str, *, several_passes: bool
) -> tuple[Iterator[Any], bool]:
    """An iteration of the loader, and whether it is the only one possible."""
    if isinstance(loader, DataLoader):
        return iter(_with_few_workers(loader)), False
    try:
        items = iter(loader)
    except TypeError:
        raise UserError(
            f"the {name} cannot be iterated", "pass a DataLoader or a list of batches"
        ) from None
    is_only = any(one is items for one in (loader, *getattr(loader, "__dict__", {}).values()))
    if is_only and several_passes and not _can_start_again(loader, items):
        raise UserError(
            f"the {name} can be iterated only once, but this run needs it several times",
            f"{_START_ANEW}, or set epochs to 1",
        )
    return items, is_only


def _can_start_again(loader: Iterable[Any], items: Iterator[Any]) -> bool:
    """Whether a loader that always returns the same iterator may restart it.

    It cannot if the iterator is a generator, or if `__iter__` does nothing but return it.
    """
    if items is not loader and not hasattr(type(items).__iter__, "__code__"):
        return False
    code = getattr(type(loader).__iter__, "__code__", None)
    return code is not None and bool(code.co_names)


def _with_few_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader, or a copy with a single worker if its workers only serve this check."""
    if loader.num_workers == 0 or isinstance(loader.dataset, IterableDataset):
        return loader
    probe = copy.copy(loader)
    # A DataLoader refuses to set any of them.
    vars(probe).update(num_workers=1, prefetch_factor=1, persistent_workers=False)
    return probe


def _may_be_stream(loader: Any, role: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether a second iteration may miss the first batch.

    A loader that drew no random number yields the same batches again, unless it is a stream. A
    DataLoader always draws; for validation, it draws anew in every evaluation, even in a resumed
    run.
    """
    if isinstance(loader, DataLoader):
        return role == "training" and isinstance(loader.dataset, IterableDataset)
    return same_states(before, after)


def same_states(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two results of `generator_states` are equal, ignoring CUDA's generator."""
    first, second = one["global"], other["global"]
    tensors = [(first["torch"], second["torch"]), *zip(one["own"], other["own"], strict=True)]
    return (
        all(first[key] == second[key] for key in ("python", "numpy"))
        and all(torch.equal(mine, theirs) for mine, theirs in tensors)
    )  # fmt: skip


def _remembered(loader: Any) -> Callable[[], None]:
    """A function that resets the generators of a loader, its samplers and its data set."""
    owners = [*_with_samplers(loader), getattr(loader, "dataset", None)]
    setters: list[Callable[[], object]] = []
    for value in (value for owner in owners for value in getattr(owner, "__dict__", {}).values()):
        if isinstance(value, (torch.Generator, np.random.RandomState)):
            generator: Any = value
            setters.append(functools.partial(generator.set_state, generator.get_state()))
        elif isinstance(value, random.Random):
            setters.append(functools.partial(value.setstate, value.getstate()))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            setters.append(functools.partial(setattr, bits, "state", bits.state))

    def reset() -> None:
        for setter in setters:
            setter()

    return reset
