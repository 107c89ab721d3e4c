"""The `tune` command: its flags and its output."""

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from training_framework.config.flags import add_config_flags, given_settings
from training_framework.errors import UserError

__all__ = ["add_tune"]

DEFAULT_OUTPUT = Path("tuned.yaml")


def add_tune(commands: Any) -> None:
    """Add the command to a parser's subcommands, as `add_subparsers` gives them."""
    summary = "find the fastest settings for a configuration on this machine"
    parser = commands.add_parser("tune", help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=_tune, parser=parser)
    add_config_flags(parser)
    parser.usage = f"{parser.prog} [--config FILE] [--trials N] [...]"
    group = parser.add_argument_group("tuning")
    group.add_argument("--trials", type=int, default=32, help="largest number of short trials (32)")
    group.add_argument(
        "--budget-seconds",
        type=float,
        metavar="S",
        help="approximate time limit; two fifths of it go to confirming the winner",
    )
    group.add_argument(
        "--memory-limit-gb",
        type=float,
        metavar="GB",
        help="reject settings that need more memory, in GB of 2^30 bytes",
    )
    group.add_argument(
        "--allow-batch-change",
        action="store_true",
        help="also vary the images per optimizer step, which changes the training",
    )
    group.add_argument("--keep", action="append", default=[], metavar="KEY",
                       help="keep a setting as it is, such as precision")  # fmt: skip
    group.add_argument("--rounds", type=int, default=6, help="paired rounds to confirm it (6)")
    group.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="FILE",
                       help=f"YAML file to train with ({DEFAULT_OUTPUT}); its evidence is written "
                       "next to it as .json")  # fmt: skip


def _tune(options: argparse.Namespace) -> None:
    from training_framework.measure.tune.tuning import tune

    limits = {
        "--trials": options.trials,
        "--rounds": options.rounds,
        "--budget-seconds": options.budget_seconds,
        "--memory-limit-gb": options.memory_limit_gb,
    }
    for flag, value in limits.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{flag} is {value}", "give a number above 0")
    memory = options.memory_limit_gb
    result = tune(
        options.config,
        given_settings(options),
        output=options.output,
        max_trials=options.trials,
        budget_seconds=options.budget_seconds,
        memory_limit_bytes=None if memory is None else round(memory * 2**30),
        allow_batch_change=options.allow_batch_change,
        keep=[key.replace("-", "_") for key in options.keep],
        rounds=options.rounds,
        command=shlex.join(["efficient-resnet", *sys.argv[1:]]),
    )
    print(result.verdict)
    for key, value in result.chosen.items():
        print(f"  {key}: {value}")
    print(f"train with: efficient-resnet train --config {shlex.quote(str(options.output))}")
    print(f"evidence: {options.output.with_suffix('.json')}")
