"""The commands `data pack` and `data inspect`: their flags and their output."""

import argparse
import sys
from pathlib import Path
from typing import Any

__all__ = ["add_inspect", "add_pack"]

_MAX_SKIPPED_SHOWN = 20


def add_pack(actions: Any) -> None:
    """Add the command to a parser's subcommands, as `add_subparsers` gives them."""
    summary = "pack an image folder into tar shards, which are faster to read and easier to copy"
    parser = actions.add_parser("pack", help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=_pack, parser=parser)
    parser.add_argument("source", type=Path, metavar="SRC", help="folder with train/ and val/")
    parser.add_argument("destination", type=Path, metavar="DEST", help="new folder")
    parser.add_argument(
        "--shorter-side",
        type=int,
        metavar="PIXELS",
        help="scale larger images down to this shorter side; smaller ones keep their bytes",
    )
    parser.add_argument(
        "--on-bad-image",
        choices=("stop", "skip"),
        default="stop",
        help="images that cannot be decoded: stop at one, or skip and list them (at most 1%% "
        "of a split)",
    )
    parser.add_argument("--workers", type=int, help="number of threads (one per core)")


def add_inspect(actions: Any) -> None:
    """Add the command to a parser's subcommands, as `add_subparsers` gives them."""
    summary = "show the contents of a folder of tar shards"
    parser = actions.add_parser("inspect", help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=_inspect, parser=parser)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of shards")
    parser.add_argument(
        "--verify", action="store_true", help="read all images and check their checksums"
    )


def _pack(options: argparse.Namespace) -> None:
    from training_framework.data.shards.packing import pack_folder
    from training_framework.machine.hardware import usable_cores

    info, index = pack_folder(
        options.source,
        options.destination,
        shorter_side=options.shorter_side,
        skip_bad=options.on_bad_image == "skip",
        workers=usable_cores() if options.workers is None else options.workers,
        report=_to_stderr,
        show_progress=True,
    )
    print(
        f"{options.destination}: {index.train_images:,} training and "
        f"{len(index) - index.train_images:,} validation images of {len(info.class_names):,} "
        f"classes in {len(index.shards):,} shards, "
        f"{sum(size for _, size in index.shards) / 1e6:,.1f} MB"
        + (f", {len(info.skipped)} bad ones skipped" if info.skipped else "")
    )


def _to_stderr(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)  # above the progress bar


def _inspect(options: argparse.Namespace) -> None:
    import numpy as np

    from training_framework.data.shards.shard_index import open_index
    from training_framework.data.sources.shards import verify_shards
    from training_framework.errors import one_line

    info, index, notes = open_index(options.folder)
    if options.verify:
        verify_shards(options.folder)
    count, lengths = len(index), index.lengths
    source = f", packed from {info.source}" if info.source else ""
    print(*notes, sep="\n", end="\n" if notes else "")
    print(one_line(f"{options.folder}: {len(index.shards):,} tar shards{source}"))
    print(
        f"  {count:,} images: {index.train_images:,} for training, "
        f"{count - index.train_images:,} for validation"
    )
    if info.shorter_side is not None:
        print(f"  shorter side at most {info.shorter_side} px")
    print(
        f"  {sum(size for _, size in index.shards) / 1e6:,.1f} MB; images of "
        f"{int(np.median(lengths)):,} bytes (median), at most {lengths.max():,}"
    )
    if options.verify:
        print(f"  checksums: all {count:,} match")
    for name in info.skipped[:_MAX_SKIPPED_SHOWN]:
        print(one_line(f"  skipped as bad: {name}"))
    if len(info.skipped) > _MAX_SKIPPED_SHOWN:
        print(f"  and {len(info.skipped) - _MAX_SKIPPED_SHOWN:,} more")
    print(f"  {len(info.class_names):,} classes, training and validation images:")
    counts = (
        np.bincount(part, minlength=len(info.class_names))
        for part in np.split(index.labels, [index.train_images])
    )
    for name, train, val in zip(info.class_names, *counts, strict=True):
        print(f"  {train:7,} {val:7,}  {one_line(name)}")
