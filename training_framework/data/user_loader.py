"""A user's own loader behind the interface of ours."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from training_framework.data.batch import Batch, prefetch_to_device
from training_framework.errors import UserError
from training_framework.machine.randomness import random_states, restore_random_states

__all__ = ["ForeignLoader", "batch_count"]


def batch_count(loader: Iterable[Any]) -> int:
    """Batches of a user's own loader.

    Raises:
        UserError: The loader has no length.
    """
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        raise UserError(
            f"the {type(loader).__name__} has no length",
            "pass a loader whose len() is its number of batches",
        ) from None


class ForeignLoader:
    """Wraps any sized iterable of (float images NCHW, int labels), such as a torch DataLoader.

    The samples' positions in the split are unknown; `indices` counts them as they come.

    Args:
        loader: Yields (images, labels, ...) and has a length. Where its sampler has a `set_epoch`,
            as DistributedSampler has, that is called.
        device: Where the batches are wanted.
        num_classes: Labels must be below it, where given.
        channels: Channels that the images must have.

    Raises:
        UserError: The loader has no length.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        device: torch.device | str,
        num_classes: int | None = None,
        channels: int = 3,
    ) -> None:
        self.batch_count = batch_count(loader)
        self._loader = loader
        self._device = torch.device(device)
        self._num_classes = num_classes
        self._epoch_start: dict[str, Any] | None = None
        self._channels = channels

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch; the first `start_batch` are loaded and passed over.

        Raises:
            UserError: A batch is not (float images NCHW, int labels).
        """
        for name in ("sampler", "batch_sampler"):
            set_epoch = getattr(getattr(self._loader, name, None), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
        return prefetch_to_device(self._host_batches(start_batch), self._device)

    def state_dict(self) -> dict[str, Any]:
        """The generators' states at the start of the epoch under way, which draw its order.

        With them, those of the loader's own generators now.
        """
        return {"epoch_start": self._epoch_start, "own": self._own_states()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the epoch under way begin as it had begun, when its later batches are asked for.

        Raises:
            ValueError, TypeError, KeyError: It is no state that `state_dict` gave, or of a loader
                with another number of generators.
        """
        self._set_own(state["own"])
        self._epoch_start = state["epoch_start"]

    def close(self) -> None:
        """Nothing: the user's loader is the user's to close."""

    def _host_batches(self, start_batch: int) -> Iterator[Batch]:
        seen = 0
        for number, item in enumerate(self._items(start_batch)):
            images, labels = self._checked(number, item)
            indices = torch.arange(seen, seen + len(labels), device=self._device)
            seen += len(labels)
            if number >= start_batch:
                yield Batch(images, labels, indices)

    def _items(self, start_batch: int) -> Iterator[Any]:
        """What the loader yields; after `start_batch` the generators are where they were before.

        A loader that shuffles draws its order when it starts. So where a run goes on in an epoch,
        the loader starts with the generators as they were at the epoch's start.
        """
        now = self._generator_states()
        if start_batch == 0 or self._epoch_start is None:
            self._epoch_start = now
            yield from self._loader
            return
        self._set_generators(self._epoch_start)
        items = iter(self._loader)
        yield from islice(items, start_batch)
        self._set_generators(now)
        yield from items

    def _own_generators(self) -> list[torch.Generator]:
        """Those that were given to the loader or its samplers, each once."""
        sampler = getattr(self._loader, "batch_sampler", None)
        owners = (self._loader, getattr(self._loader, "sampler", None), sampler)
        found = (getattr(owner, "generator", None) for owner in owners)
        return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())

    def _own_states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._own_generators()]

    def _set_own(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._own_generators(), states, strict=True):
            generator.set_state(state)

    def _generator_states(self) -> dict[str, Any]:
        return {"global": random_states(self._device), "own": self._own_states()}

    def _set_generators(self, states: dict[str, Any]) -> None:
        restore_random_states(states["global"], self._device)
        self._set_own(states["own"])

    def _checked(self, number: int, item: Any) -> tuple[Tensor, Tensor]:
        where = f"batch {number} of the {type(self._loader).__name__}"
        if not (isinstance(item, (tuple, list)) and len(item) >= 2):
            raise UserError(f"{where} is a {type(item).__name__}", "yield (images, labels)")
        images, labels = item[0], item[1]
        if not (isinstance(images, Tensor) and isinstance(labels, Tensor)):
            raise UserError(
                f"{where} holds {type(images).__name__} and {type(labels).__name__}",
                "yield two tensors",
            )
        if not images.is_floating_point():
            raise UserError(
                f"{where}: the images are {images.dtype}", "make them float and normalized"
            )
        if images.ndim != 4 or images.shape[1] != self._channels:
            raise UserError(
                f"{where}: the images have shape {tuple(images.shape)}",
                f"yield (N, {self._channels}, H, W)",
            )
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise UserError(
                f"{where}: the labels are {labels.dtype} of shape {tuple(labels.shape)}",
                f"yield {len(images)} integers",
            )
        self._check_range(number, where, labels)
        images = images.float() if images.dtype == torch.float64 else images
        # Labels are counted some batches later; a loader may fill the same tensor again by then.
        return images, labels.to(torch.int64, copy=True)

    def _check_range(self, number: int, where: str, labels: Tensor) -> None:
        # Reading labels that are on an accelerator waits for it, which one batch can afford.
        if self._num_classes is None or (number > 0 and labels.device.type != "cpu"):
            return
        wrong = labels[(labels < 0) | (labels >= self._num_classes)]
        if len(wrong):
            raise UserError(
                f"{where}: label {int(wrong[0])} is not in 0..{self._num_classes - 1}",
                "number the classes from 0, or set num_classes",
            )
