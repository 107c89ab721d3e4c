"""Images that could not be decoded: skipped, counted, listed, and limited in number."""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

from training_framework.errors import UserError, one_line

__all__ = ["BadImages", "SplitName"]

SplitName = Literal["train", "val"]

_SPLITS: tuple[SplitName, ...] = ("train", "val")
_ALWAYS_ALLOWED = 10
_ALLOWED_PERCENT = 1
_MAX_NAMED_IN_ERROR = 5
_MAX_NOTES = 10


def _warn(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=2)


class BadImages:
    """The bad images of a run, each counted once; too many in a split are an error.

    The limit of a split is 1% of its images or 10, whichever is more, but always less than half.

    Args:
        train: Images of the training split.
        val: Images of the validation split.
        report: Shows a line to the user; by default as a warning.
    """

    def __init__(self, *, train: int, val: int, report: Callable[[str], None] = _warn) -> None:
        self._counts: dict[SplitName, int] = {"train": train, "val": val}
        self._reasons: dict[SplitName, dict[str, str]] = {"train": {}, "val": {}}
        self._report = report
        self._path: Path | None = None

    def __len__(self) -> int:
        return sum(map(len, self._reasons.values()))

    def limit(self, split: SplitName) -> int:
        """The number of bad images that a split may have."""
        count = self._counts[split]
        return max(0, min(max(_ALWAYS_ALLOWED, count * _ALLOWED_PERCENT // 100), (count - 1) // 2))

    def add(self, split: SplitName, reasons: Mapping[str, str]) -> None:
        """Add images, as reasons by name; those already known are ignored.

        Raises:
            UserError: The split has too many bad images, or the list cannot be written.
        """
        known = self._reasons[split]
        fresh = {name: reason for name, reason in reasons.items() if name not in known}
        for name, reason in fresh.items():
            known[name] = reason
            self._say(name, reason)
        self._append(split, fresh)
        limit = self.limit(split)
        if fresh and len(known) > limit:
            first = ", ".join(list(known)[:_MAX_NAMED_IN_ERROR])
            raise UserError(
                f"{len(known)} images of the {split} split cannot be decoded, but at most {limit} "
                f"of {self._counts[split]} may be skipped: {first}"
                + (", ..." if len(known) > _MAX_NAMED_IN_ERROR else ""),
                "repair or delete them" + (f"; {self._path} lists them all" if self._path else ""),
            )

    def by_split(self) -> dict[SplitName, dict[str, str]]:
        """Names and reasons of all bad images so far, by split."""
        return {split: dict(reasons) for split, reasons in self._reasons.items()}

    def list_in(self, path: Path, report: Callable[[str], None]) -> None:
        """Keep the list in a file, and continue the list already in it.

        A line consists of the split, the name of the image and the reason, separated by tabs. A
        name with tabs, newlines or bytes that are not text is written as a JSON string.

        Args:
            path: The file; if it does not exist, the first bad image creates it.
            report: Shows a line to the user from now on.

        Raises:
            UserError: The file cannot be read or written.
        """
        listed = _read(path)
        found, self._path, self._report = self._reasons, path, report
        self._reasons = listed
        for split in _SPLITS:
            new = {n: reason for n, reason in found[split].items() if n not in listed[split]}
            listed[split].update(new)
            self._append(split, new)

    def _say(self, name: str, reason: str) -> None:
        if len(self) <= _MAX_NOTES:
            self._report(one_line(f"note: skipped {name}: {reason}"))
        if len(self) == _MAX_NOTES:
            self._report("note: further bad images are listed but not shown")

    def _append(self, split: SplitName, reasons: Mapping[str, str]) -> None:
        if self._path is None or not reasons:
            return
        lines = (f"{split}\t{_written(n)}\t{one_line(why)}\n" for n, why in reasons.items())
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written to ({error.strerror})", "free some space there"
            ) from None


def _written(name: str) -> str:
    return name if name.isprintable() and not name.startswith('"') else json.dumps(name)


def _read(path: Path) -> dict[SplitName, dict[str, str]]:
    """The images that a file lists; removes a last line that a kill cut off."""
    listed: dict[SplitName, dict[str, str]] = {"train": {}, "val": {}}
    try:
        if not path.exists():
            return listed
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        if torn:
            with path.open("r+b") as file:
                file.truncate(len(whole) + (1 if whole else 0))
        for split, name, reason in _fields(whole.decode("utf-8").split("\n")):
            listed[split][json.loads(name) if name.startswith('"') else name] = reason
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check the file") from None
    except ValueError:  # not UTF-8, not JSON
        raise UserError(
            f"{path}: not a list of bad images", "move it away; the run then starts a new list"
        ) from None
    return listed


def _fields(lines: Iterable[str]) -> Iterable[tuple[SplitName, str, str]]:
    for line in filter(None, lines):
        split, name, reason = line.split("\t")
        yield _SPLITS[_SPLITS.index(split)], name, reason
