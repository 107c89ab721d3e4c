"""The `evaluate` and `predict` commands: their flags and their output."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from training_framework.config.flags import add_config_flags, given_settings
from training_framework.errors import UserError

__all__ = ["add_evaluate", "add_predict"]


def add_evaluate(commands: Any) -> None:
    """Add the command to a parser's subcommands, as `add_subparsers` gives them."""
    summary = "evaluate a checkpoint on the data of its run, or on other data (--data)"
    parser = commands.add_parser("evaluate", help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=_evaluate, parser=parser)
    parser.add_argument("checkpoint", type=Path, help=".ckpt or weights.safetensors of a run")
    add_config_flags(
        parser,
        ("data", "data_root", "batch_size", "accelerator", "precision", "threads", "num_workers",
         "on_bad_image", "tta"),
    )  # fmt: skip
    parser.usage = f"{parser.prog} CHECKPOINT [--SETTING VALUE ...]"


def add_predict(commands: Any) -> None:
    """Add the command to a parser's subcommands, as `add_subparsers` gives them."""
    summary = "classify images"
    parser = commands.add_parser("predict", help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=_predict, parser=parser)
    parser.add_argument("checkpoint", type=Path, help=".ckpt or weights.safetensors of a run")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=3, help="number of classes to show for each (3)")
    add_config_flags(parser, ("accelerator", "precision", "threads", "on_bad_image"))


def _evaluate(options: argparse.Namespace) -> None:
    from training_framework.inference import evaluate_file
    from training_framework.machine.distributed import Processes

    evaluation, facts = evaluate_file(options.checkpoint, given_settings(options))
    metrics = evaluation.metrics
    if not Processes.from_environment().is_first:
        return
    skipped = facts.val_images - metrics.count
    if skipped:
        print(
            f"note: {skipped:,} of {facts.val_images:,} images are bad and were skipped",
            file=sys.stderr,
        )
    print(
        f"{facts.name}: {metrics.count:,} images  top-1 {metrics.acc1:.2f}%  "
        f"top-5 {metrics.acc5:.2f}%  loss {metrics.loss:.4f}  in {evaluation.seconds:.1f} s"
    )
    if evaluation.acc1_tta is not None:
        print(f"  with test-time augmentation: top-1 {evaluation.acc1_tta:.2f}%")


def _predict(options: argparse.Namespace) -> None:
    from training_framework.inference import predict_files

    if options.top < 1:
        raise UserError(f"--top is {options.top}", "give 1 or more")
    for path, ranking in predict_files(
        options.checkpoint, options.images, top=options.top, overrides=given_settings(options)
    ):
        classes = "  ".join(f"{name} {100 * share:.1f}%" for name, share in ranking)
        # A name that is not UTF-8 cannot be printed as it is.
        shown = os.fsencode(path).decode(errors="replace")
        print(f"{shown}: {classes}")
