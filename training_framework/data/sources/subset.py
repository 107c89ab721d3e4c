"""Copy a small random part of an image folder."""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from training_framework.data.draws import Purpose, keyed_generator
from training_framework.data.sources.folder import (
    class_files,
    class_names,
    split_folder,
    val_folder,
)
from training_framework.errors import UserError

__all__ = ["SubsetSummary", "make_subset"]


@dataclass(frozen=True, kw_only=True)
class SubsetSummary:
    """The folder that `make_subset` wrote.

    Attributes:
        dest: The new folder.
        classes: Names of its classes, sorted.
        train_images: Number of training images.
        val_images: Number of validation images.
    """

    dest: Path
    classes: tuple[str, ...]
    train_images: int
    val_images: int


def make_subset(
    source: Path, dest: Path, *, classes: int, train_per_class: int, val_per_class: int, seed: int
) -> SubsetSummary:
    """Copy a random part of an image folder into a new one, with the same layout.

    The folder appears whole or not at all; its `subset.json` lists the chosen images.

    Args:
        source: Folder with train/<class>/* and val/<class>/* (or test/).
        dest: The new folder; it may exist if it is empty.
        classes: Number of classes to take.
        train_per_class: Training images per class, at least 1.
        val_per_class: Validation images per class, at least 1.
        seed: Draws classes and images; the same seed takes the same ones.

    Raises:
        UserError: `dest` is not empty, or `source` has too few classes or images.
    """
    for key, value in (
        ("classes", classes),
        ("train-per-class", train_per_class),
        ("val-per-class", val_per_class),
    ):
        if value < 1:
            raise UserError(f"{key} is {value}", "take at least 1")
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise UserError(f"{dest}: exists and is not an empty folder", "name a new folder")
    train_folder, evaluated = split_folder(source, "train"), val_folder(source)
    found = class_names(train_folder)
    if len(found) < classes:
        raise UserError(
            f"{train_folder}: has {len(found)} classes, not {classes}",
            f"ask for at most {len(found)}",
        )
    generator = keyed_generator(seed, Purpose.SUBSET)
    names = tuple(sorted(found[row] for row in generator.permutation(len(found))[:classes]))
    wanted = (("train", train_folder, train_per_class), ("val", evaluated, val_per_class))
    chosen: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}}
    for name in names:
        for split, folder, count in wanted:
            files = _class_files_in(folder / name, count)
            taken = sorted(generator.permutation(len(files))[:count].tolist())
            chosen[split][name] = [files[row] for row in taken]
    record = {
        "source": source.resolve().name,
        "seed": seed,
        "train_per_class": train_per_class,
        "val_per_class": val_per_class,
        **chosen,
    }
    _copy(dest, {"train": train_folder, "val": evaluated}, chosen, json.dumps(record, indent=1))
    return SubsetSummary(
        dest=dest,
        classes=names,
        train_images=classes * train_per_class,
        val_images=classes * val_per_class,
    )


def _class_files_in(folder: Path, count: int) -> list[str]:
    """The images of a class relative to its folder, at least `count`."""
    files = [Path(path).relative_to(folder).as_posix() for path in class_files(folder)]
    if len(files) < count:
        raise UserError(
            f"{folder}: has {len(files)} images, not {count}", f"ask for at most {len(files)}"
        )
    return files


def _copy(
    dest: Path,
    sources: dict[str, Path],
    chosen: dict[str, dict[str, list[str]]],
    record: str,
) -> None:
    """Copy to a temporary folder, then rename it: an interrupted copy leaves nothing behind."""
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}-") as scratch:
            complete = Path(scratch) / "subset"
            for split, classes in chosen.items():
                for name, files in classes.items():
                    for file in files:
                        target = complete / split / name / file
                        target.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(sources[split] / name / file, target)
            (complete / "subset.json").write_text(record + "\n", encoding="utf-8")
            if dest.exists():
                dest.rmdir()
            complete.rename(dest)
    except OSError as error:
        raise UserError(
            f"{error.filename or dest}: {error.strerror}", "free some space, or name another folder"
        ) from None
