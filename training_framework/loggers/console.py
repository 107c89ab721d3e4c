"""Progress for the person at the console: a bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm

__all__ = ["ConsoleLogger"]

_LINE_WIDTH = 80
_REDRAW_SECONDS = 0.5


class ConsoleLogger:
    """Shows progress on stderr, so that stdout is left for results.

    Where nobody can read it any more (a closed terminal, a pipe whose reader has left), it is
    silent, and the run continues.

    On a terminal: a bar with the loss, accuracy, learning rate and images per second of the last
    logged step and the time left, and a line for each evaluation. Elsewhere (a file, a batch
    system's log): a line of at most 80 columns for each logged step and each evaluation.

    Args:
        total_steps: Optimizer steps of the whole run.
        start_step: Steps made before this start, where a run is resumed.
        total_epochs: Epochs of the whole run, to show beside the epoch; None: not shown.
        terminal: Draw a bar; None: where `stream` is a terminal.
        stream: Where to write; None: stderr as it is now.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        start_step: int = 0,
        total_epochs: int | None = None,
        terminal: bool | None = None,
        stream: TextIO | None = None,
    ) -> None:
        stream = sys.stderr if stream is None else stream
        self._stream: Any = _StreamThatMayGo(stream)
        self._total_steps = total_steps
        self._total_epochs = total_epochs
        self._bar: tqdm | None = None
        if stream.isatty() if terminal is None else terminal:
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                mininterval=_REDRAW_SECONDS,
            )

    def advance(self, step: int) -> None:
        """Move the bar to `step` optimizer steps made; cheap enough for every step.

        tqdm learns how many steps make its redraw interval and only counts in between.
        """
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values of a step: training in the bar or a line, an evaluation in a line."""
        position = self._position(step, values)
        if self._bar is not None:
            self.advance(step)
            if "train/loss" in values:
                if "epoch" in values:
                    self._bar.set_description_str(self._epoch(values), refresh=False)
                self._bar.set_postfix_str(", ".join(_training(values, bar=True)), refresh=False)
        elif "train/loss" in values:
            self.message(_line([*position, *_training(values, bar=False)]))
        if "val/loss" in values:
            self.message(_line([*position, *_evaluation(values)]))

    def message(self, text: str) -> None:
        """Write a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands and end its line."""
        if self._bar is not None:
            self._bar.close()

    def _position(self, step: int, values: Mapping[str, float]) -> list[str]:
        epoch = [self._epoch(values)] if "epoch" in values else []
        return [*epoch, f"step {step}/{self._total_steps}"]

    def _epoch(self, values: Mapping[str, float]) -> str:
        total = "" if self._total_epochs is None else f"/{self._total_epochs}"
        return f"epoch {int(values['epoch']) + 1}{total}"


class _StreamThatMayGo:
    """A text stream that may be lost without an error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # tqdm asks for the encoding and the terminal's width


def _format(values: Mapping[str, float], formats: dict[str, str]) -> list[str]:
    return [text.format(values[name]) for name, text in formats.items() if name in values]


def _training(values: Mapping[str, float], *, bar: bool) -> list[str]:
    formats = {
        "train/loss": "loss {:.3f}",
        "train/acc1": "acc1 {:.1f}%",
        "images_per_second": "{:.0f} images/s",
    }
    formats |= {"lr": "lr {:.2g}"} if bar else {"data_wait": "data wait {:.1%}"}
    return _format(values, formats)


def _evaluation(values: Mapping[str, float]) -> list[str]:
    return _format(
        values,
        {
            "val/loss": "val loss {:.3f}",
            "val/acc1": "acc1 {:.2f}%",
            "val/acc5": "acc5 {:.2f}%",
            "eval_seconds": "in {:.1f} s",
        },
    )


def _line(fields: list[str]) -> str:
    """The fields side by side; those at the end, which matter least, only where they fit."""
    line = "  ".join(fields)
    while len(line) > _LINE_WIDTH and len(fields) > 1:
        fields = fields[:-1]
        line = "  ".join(fields)
    return line
