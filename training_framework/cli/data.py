"""The commands `data pack` and `data inspect`: their flags, and what they print."""

import argparse
import sys
from pathlib import Path
from typing import Any

__all__ = ["add_inspect", "add_pack"]

_MOST_SKIPPED_SHOWN = 20


def add_pack(actions: Any) -> None:
    """Add the command to a parser's subcommands, as `add_subparsers` gives them."""
    summary = "pack an image folder into one file, which is read faster"
    parser = actions.add_parser("pack", help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=_pack, parser=parser)
    parser.add_argument("source", type=Path, metavar="SRC", help="folder with train/ and val/")
    parser.add_argument("destination", type=Path, metavar="DEST.arrow", help="new file")
    parser.add_argument(
        "--shorter-side",
        type=int,
        metavar="PIXELS",
        help="scale larger pictures down to this shorter side; others keep their bytes",
    )
    parser.add_argument(
        "--quality", type=int, help="JPEG quality of those that are scaled down, 1 to 100 (90)"
    )
    parser.add_argument(
        "--pixels", action="store_true", help="store raw pixels of the squares in the middle"
    )
    parser.add_argument(
        "--on-bad-image",
        choices=("stop", "skip"),
        default="stop",
        help="a picture that cannot be decoded: stop, or skip and list it, 1%% of a split at most",
    )
    parser.add_argument("--processes", type=int, help="processes (as many as there are cores)")


def add_inspect(actions: Any) -> None:
    """Add the command to a parser's subcommands, as `add_subparsers` gives them."""
    summary = "show what is in a packed file"
    parser = actions.add_parser("inspect", help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=_inspect, parser=parser)
    parser.add_argument("file", type=Path, metavar="FILE", help="what `data pack` wrote")
    parser.add_argument(
        "--verify", action="store_true", help="read every picture and compare its checksum"
    )


def _pack(options: argparse.Namespace) -> None:
    from training_framework.data.shards.packing import pack_folder
    from training_framework.machine.hardware import usable_cores

    summary = pack_folder(
        options.source,
        options.destination,
        pixels=options.pixels,
        shorter_side=options.shorter_side,
        quality=options.quality,
        skip_bad=options.on_bad_image == "skip",
        processes=usable_cores() if options.processes is None else options.processes,
        report=_to_stderr,
        show_progress=True,
    )
    info = summary.info
    print(
        f"{summary.dest}: {info.train_images:,} training and {info.val_images:,} validation "
        f"pictures of {len(info.class_names):,} classes, {summary.file_bytes / 1e6:,.1f} MB"
        + (f", {len(info.skipped)} bad ones left out" if info.skipped else "")
    )


def _to_stderr(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)  # above the progress bar


def _inspect(options: argparse.Namespace) -> None:
    from training_framework.data.shards.packed import inspect_packed
    from training_framework.errors import one_line

    report = inspect_packed(options.file, verify=options.verify)
    info = report.info
    count = info.train_images + info.val_images
    if info.pixels is not None:
        stored = f"raw pixels, {info.pixels}x{info.pixels}"
    else:
        stored = (
            f"picture files, {_range(report.width_range)} px wide, "
            f"{_range(report.height_range)} px high"
        )
        if info.shorter_side is not None:
            stored += f"; shorter side at most {info.shorter_side}, quality {info.quality}"
    print(one_line(f"{options.file}: packed from {info.source}, format {info.format_version}"))
    print(f"  {count:,} pictures: {info.train_images:,} to train, {info.val_images:,} to validate")
    print(f"  {stored}")
    print(
        f"  {report.file_bytes / 1e6:,.1f} MB; pictures of {report.median_image_bytes:,} bytes at "
        f"the median, {report.largest_image_bytes:,} at most"
    )
    if options.verify:
        print(f"  checksums: all {count:,} are right")
    for name in info.skipped[:_MOST_SKIPPED_SHOWN]:
        print(one_line(f"  left out as bad: {name}"))
    if len(info.skipped) > _MOST_SKIPPED_SHOWN:
        print(f"  and {len(info.skipped) - _MOST_SKIPPED_SHOWN:,} more")
    print(f"  {len(info.class_names):,} classes, training and validation pictures:")
    for name, train, val in zip(
        info.class_names, report.train_per_class, report.val_per_class, strict=True
    ):
        print(f"  {train:7,} {val:7,}  {one_line(name)}")


def _range(ends: tuple[int, int]) -> str:
    return f"{ends[0]:,}" if ends[0] == ends[1] else f"{ends[0]:,} to {ends[1]:,}"
