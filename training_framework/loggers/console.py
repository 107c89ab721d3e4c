"""Show progress on the console: a bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm

__all__ = ["ConsoleLogger"]

_LINE_WIDTH = 80
_REDRAW_SECONDS = 0.5


class ConsoleLogger:
    """Shows progress on stderr, so that stdout only has results.

    If the output can no longer be read (a closed terminal, a pipe whose reader has quit), it stays
    silent, and the run continues.

    On a terminal: a bar with the loss, accuracy, learning rate and images per second of the last
    logged step and the time left, and a line per evaluation. Elsewhere (a file, the log of a batch
    system): a line of at most 80 columns per logged step and per evaluation.

    Args:
        total_steps: Optimizer steps of the whole run.
        start_step: Steps made before this start, if the run is resumed.
        total_epochs: Epochs of the whole run, to show next to the epoch; None: not shown.
        terminal: Whether to draw a bar; None: if `stream` is a terminal.
        stream: Stream to write to; None: the present stderr.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        start_step: int = 0,
        total_epochs: float | None = None,
        terminal: bool | None = None,
        stream: TextIO | None = None,
    ) -> None:
        stream = sys.stderr if stream is None else stream
        self._stream: Any = _StreamThatMayClose(stream)
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
        """Move the bar to `step` optimizer steps; cheap enough for every step.

        tqdm learns how many steps fit into its redraw interval and only counts in between.
        """
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values of a step: training in the bar or in a line, evaluations in a line."""
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
        """Write a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        if self._bar is not None:
            self._bar.close()

    def _position(self, step: int, values: Mapping[str, float]) -> list[str]:
        epoch = [self._epoch(values)] if "epoch" in values else []
        return [*epoch, f"step {step}/{self._total_steps}"]

    def _epoch(self, values: Mapping[str, float]) -> str:
        total = "" if self._total_epochs is None else f"/{self._total_epochs}"
        return f"epoch {int(values['epoch']) + 1}{total}"


class _StreamThatMayClose:
    """A text stream whose write errors are ignored."""

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
            "val/acc1_tta": "with TTA {:.2f}%",
            "eval_seconds": "in {:.1f} s",
        },
    )


def _line(fields: list[str]) -> str:
    """The fields joined; the last ones, which matter least, are dropped if they do not fit."""
    line = "  ".join(fields)
    while len(line) > _LINE_WIDTH and len(fields) > 1:
        fields = fields[:-1]
        line = "  ".join(fields)
    return line
