"""Give a user's own loader the interface of the framework's loaders."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from training_framework.data.batch import Batch, prefetch_to_device
from training_framework.data.user_batches import as_floats, checked_batch
from training_framework.data.user_look import (
    Begun,
    LookedAtLoader,
    batch_count,
    generator_states,
    own_generators,
    same_states,
)
from training_framework.errors import UserError
from training_framework.machine.randomness import restore_random_states

__all__ = ["UserLoader", "batch_count"]


class UserLoader:
    """Wraps any sized iterable of batches, such as a torch DataLoader.

    Batches are as `checked_batch` takes them. The positions of the samples in the split are
    unknown, so `indices` numbers them in the order in which they arrive.

    Args:
        loader: The user's loader, whether `look_at` has checked it or not. If its sampler has a
            `set_epoch`, like DistributedSampler, every epoch calls it.
        device: The device of the batches.
        num_classes: Labels must be below it; None: they are not checked.
        channels: Channels that the images must have.

    Raises:
        UserError: The loader has no length.
    """

    def __init__(
        self,
        loader: Iterable[Any] | LookedAtLoader,
        *,
        device: torch.device | str,
        num_classes: int | None = None,
        channels: int = 3,
    ) -> None:
        self._begun: Begun | None = None
        if isinstance(loader, LookedAtLoader):
            self._loader, self._name, self._begun = loader.loader, loader.name, loader.begun
            self.batch_count = loader.batch_count
        else:
            self._loader, self._name = loader, type(loader).__name__
            self.batch_count = batch_count(loader)
        self._device = torch.device(device)
        self._num_classes = num_classes
        self._epoch_start: dict[str, Any] | None = None
        self._channels = channels

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, images in fp32; the first `start_batch` are skipped.

        Raises:
            UserError: A batch is not images and labels, or there is no batch.
        """
        for name in ("sampler", "batch_sampler"):
            set_epoch = getattr(getattr(self._loader, name, None), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
        return self._device_batches(epoch, start_batch)

    def state_dict(self) -> dict[str, Any]:
        """The states of the generators at the start of this epoch, which draw its order.

        The current states of the loader's own generators are included.
        """
        return {"epoch_start": self._epoch_start, "own": self._own_states()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the interrupted epoch start as before, so that its later batches are the same.

        Raises:
            ValueError, TypeError, KeyError: It is not a state from `state_dict`, or the loader had
                another number of generators.
        """
        self._set_own(state["own"])
        self._epoch_start = state["epoch_start"]

    def close(self) -> None:
        """Drop an iteration that was started; the user closes their own loader."""
        self._begun = None

    def _device_batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        for batch in prefetch_to_device(self._host_batches(epoch, start_batch), self._device):
            yield batch._replace(images=as_floats(batch.images))

    def _host_batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        seen = 0
        for number, item in enumerate(self._items(epoch, start_batch)):
            images, labels = checked_batch(
                item,
                f"batch {number} of the {self._name}",
                num_classes=self._num_classes,
                channels=self._channels,
                may_wait=number == 0,
            )
            indices = torch.arange(seen, seen + len(labels), device=self._device)
            seen += len(labels)
            if number >= start_batch:
                yield Batch(images, labels, indices)
        if not seen:
            raise UserError(
                f"the {self._name} yields no batch in epoch {epoch}, but its length is "
                f"{self.batch_count}",
                "make every iter() of it start from the beginning, as a list or a DataLoader does",
            )

    def _items(self, epoch: int, start_batch: int) -> Iterator[Any]:
        """Iterate the loader; after `start_batch`, the generators have their present states again.

        A loader that shuffles draws its order when it starts. So when a run resumes within an
        epoch, the loader starts with the states that the generators had when the epoch started.
        """
        now = generator_states(self._loader, self._device)
        begun, self._begun = self._begun, None
        if start_batch == 0 or self._epoch_start is None:
            if begun is None or not (begun.is_only or epoch == 0):
                self._epoch_start = now
                yield from self._loader
                return
            self._epoch_start = begun.before
            if same_states({**now, "own": begun.before["own"]}, begun.before):
                # Nothing has drawn since the seed was set, so repeat the draws of `look_at` here.
                restore_random_states(begun.after["global"], self._device)
            yield from begun.items
            return
        if begun is not None and (begun.is_only or same_states(begun.before, self._epoch_start)):
            items = begun.items
            self._set_generators(begun.after)
        else:
            self._set_generators(self._epoch_start)
            items = iter(self._loader)
        yield from islice(items, start_batch)
        self._set_generators(now)
        yield from items

    def _own_states(self) -> list[Tensor]:
        return [generator.get_state() for generator in own_generators(self._loader)]

    def _set_own(self, states: list[Tensor]) -> None:
        for generator, state in zip(own_generators(self._loader), states, strict=True):
            generator.set_state(state)

    def _set_generators(self, states: dict[str, Any]) -> None:
        restore_random_states(states["global"], self._device)
        self._set_own(states["own"])
