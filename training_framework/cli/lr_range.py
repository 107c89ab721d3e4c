"""The `lr-range` command: its flags and its output."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from training_framework.config.flags import add_config_flags, given_settings
from training_framework.errors import UserError

__all__ = ["add_lr_range"]

DEFAULT_OUTPUT = Path("lr-range.png")


def add_lr_range(commands: Any) -> None:
    """Add the command to a parser's subcommands, as `add_subparsers` gives them."""
    summary = "find a learning rate: train a few steps at growing rates"
    parser = commands.add_parser("lr-range", help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=_lr_range, parser=parser)
    add_config_flags(parser)
    parser.usage = f"{parser.prog} [--config FILE] [--from RATE] [--to RATE] [...]"
    group = parser.add_argument_group("range test")
    group.add_argument("--from", type=float, default=1e-5, dest="lowest", metavar="RATE",
                       help="rate of the first step (1e-5)")  # fmt: skip
    group.add_argument("--to", type=float, default=10.0, dest="highest", metavar="RATE",
                       help="rate of the last step (10)")  # fmt: skip
    group.add_argument("--steps", type=int, default=100, help="number of steps (100)")
    group.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="FILE",
                       help=f"the plot, a PNG ({DEFAULT_OUTPUT}); its numbers are written next to "
                       "it as .json")  # fmt: skip


def _lr_range(options: argparse.Namespace) -> None:
    from training_framework.measure.lr_range import (
        measure_lr_range,
        plot_lr_range,
        write_lr_range,
    )
    from training_framework.runs.directory import check_writable
    from training_framework.train import configure

    output: Path = options.output
    if output.suffix != ".png":
        raise UserError(f"--output {output}: the plot is a PNG", "name a .png file")
    check_writable(output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    found = measure_lr_range(
        configure(options.config, given_settings(options), source="command line"),
        lowest=options.lowest,
        highest=options.highest,
        steps=options.steps,
        say=lambda line: print(f"{line} ...", file=sys.stderr),
    )
    command = shlex.join(["efficient-resnet", *sys.argv[1:]])
    plot_lr_range(found, output, title=options.config or "learning-rate range test")
    write_lr_range(found, output.with_suffix(".json"), command=command)
    print(f"rate where the loss falls fastest        {found.steepest:.3g}")
    print(f"a tenth of the rate of the lowest loss   {found.tenth_of_least:.3g}")
    print(f"suggested peak rate                      {found.suggestion:.2g}")
    print(f"plot: {output}, numbers: {output.with_suffix('.json')}")
