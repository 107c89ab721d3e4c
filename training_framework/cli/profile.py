"""The `profile` command: its flags and its output."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from training_framework.config.flags import add_config_flags, given_settings

__all__ = ["add_profile"]

DEFAULT_OUTPUT_DIR = Path("profiles")


def add_profile(commands: Any) -> None:
    """Add the command to a parser's subcommands, as `add_subparsers` gives them."""
    summary = "show where a run spends its time, and what to do about it"
    parser = commands.add_parser(
        "profile",
        help=summary,
        description=f"{summary}; writes its files to --output-dir ({DEFAULT_OUTPUT_DIR})",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_profile, parser=parser)
    parser.add_argument("--steps", type=int, default=20, help="steps per measurement (20)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before measuring (5)")
    add_config_flags(parser)
    parser.usage = f"{parser.prog} [--config FILE] [--steps N] [...]"


def _profile(options: argparse.Namespace) -> None:
    # Set before torch is imported; otherwise its profiler announces every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from training_framework.measure.profile.profile import profile_run
    from training_framework.measure.profile.text import profile_lines
    from training_framework.train import configure

    settings = given_settings(options)
    config = configure(options.config, settings, source="command line")
    profile = profile_run(
        config,
        steps=options.steps,
        warmup=options.warmup,
        # The output_dir of a configuration file is for runs, not for profiles.
        output_dir=config.output_dir if "output_dir" in settings else DEFAULT_OUTPUT_DIR,
        command=shlex.join(["efficient-resnet", *sys.argv[1:]]),
        say=lambda text: print(f"{text} ...", file=sys.stderr),
    )
    print("\n".join(["", *profile_lines(profile)]))
