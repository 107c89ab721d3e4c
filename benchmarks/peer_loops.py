"""Training loops of other libraries, with the settings of `B1 in fp32`: the same plain network,
data on the device, channels_last, no logging, no checkpoints, and the same clock.

    pip install pytorch-lightning
"""

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from reference_loops import B1
from torch import Tensor, nn
from torch.nn import functional

from training_framework.measure.compare.step_times import StepTimes

__all__ = ["LightningLoop"]


class _Batches:
    """A loader that yields a number of B1's batches."""

    def __init__(self, loop: B1, count: int) -> None:
        self.loop, self.count = loop, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.count):
            yield self.loop.batch()


class LightningLoop:
    """Lightning's Trainer; arguments as for `B1`.

    Raises:
        ImportError: pytorch-lightning is not installed.
    """

    def __init__(self, *arguments: Any, batch_size: int, device: torch.device) -> None:
        import pytorch_lightning as lightning

        # It says at every start what it runs on, and what it could also do.
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
        loop = B1(*arguments, batch_size=batch_size, device=device, bf16=False)
        self.model: nn.Module = loop.model
        self._loop = loop
        self._lightning = lightning
        self._accelerator = "gpu" if device.type == "cuda" else "cpu"
        self._module = self._make_module(loop)

    def timed_steps(self, steps: int) -> list[float]:
        """Seconds of each of so many steps; the first one of a fit() is made before them."""
        times: list[StepTimes] = []
        device = self._loop.device

        class Clock(self._lightning.Callback):  # type: ignore[name-defined]
            def on_train_batch_end(self, *_: Any) -> None:
                if times:
                    times[0].end_step()
                else:
                    times.append(StepTimes(device))

        trainer = self._lightning.Trainer(
            accelerator=self._accelerator,
            devices=1,
            precision="32-true",
            benchmark=device.type == "cuda",
            max_steps=steps + 1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Clock()],
        )
        trainer.fit(self._module, _Batches(self._loop, steps + 1))
        return times[0].seconds()

    def _make_module(self, loop: B1) -> Any:
        class Module(self._lightning.LightningModule):  # type: ignore[name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.network = loop.model

            def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
                images, labels = batch
                return functional.cross_entropy(self.network(images), labels)

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return loop.optimizer

        return Module()
