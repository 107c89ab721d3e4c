"""The YAML that `tune` writes: what was chosen, on top of the configuration that was tuned."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from training_framework.errors import UserError
from training_framework.measure.tune.result import TuningResult
from training_framework.runs.directory import write_text_atomically

__all__ = ["write_tuned_yaml"]


def write_tuned_yaml(
    tuning: TuningResult, extends: str | None, settings: Mapping[str, Any], output: Path
) -> None:
    """Write a YAML file to train from.

    Args:
        tuning: What was found.
        extends: File or shipped name that it builds on; a file is named relative to `output`.
        settings: What was given beside that.
        output: The file.

    Raises:
        UserError: The place cannot be written to.
    """
    content: dict[str, Any] = {}
    if extends is not None:
        file = Path(extends).expanduser()
        here = output.resolve().parent
        content["extends"] = os.path.relpath(file.resolve(), here) if file.is_file() else extends
    content |= {**settings, **tuning.chosen}
    remarks = [tuning.verdict, f"Evidence: {output.with_suffix('.json').name}"]
    if "batch_size" in tuning.chosen:
        remarks.append("Batch norm sees other batches than before: compare the accuracy too.")
    comment = "".join(f"# {line}\n" for line in remarks)
    _write(output, comment + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _write(output: Path, text: str) -> None:
    try:
        write_text_atomically(output, text)
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot be written to ({error.strerror})", "name another file"
        ) from None
