"""Result files of the reliability experiments: what ran, on what machine, and what happened."""

import json
import platform
import re
import time
from pathlib import Path
from typing import Any

from training_framework.machine.hardware import detect_hardware, library_versions
from training_framework.measure.compare.environment import source_commit

__all__ = ["RESULTS", "write_result"]

RESULTS = Path(__file__).parent / "results"


def write_result(
    experiment: str, folder: Path, fields: dict[str, Any], *, device: str = "cpu-1-threads"
) -> Path:
    """Write `<experiment>_<device>_<torch>_<date>.json` and return its path.

    Args:
        experiment: Its name.
        folder: For the file; created if it is missing.
        fields: What the experiment found, as plain values.
        device: The device's name in the file's name.
    """
    versions, date = library_versions(), time.strftime("%Y-%m-%d", time.gmtime())
    result = {
        "experiment": experiment,
        "date": date,
        "commit": source_commit() or "",
        "device_name": detect_hardware().cpu_name,
        "python": platform.python_version(),
        "versions": versions,
        **fields,
    }
    folder.mkdir(parents=True, exist_ok=True)
    release = versions["torch"].partition("+")[0]
    path = folder / f"{experiment}_{device}_{release}_{date}.json"
    text = json.dumps(result, indent=1)
    # Messages name files in a temporary folder of this machine; its path means nothing elsewhere.
    text = re.sub(r"(?<![\w.])/[\w./-]*/(?=[\w.=-]+)", "", text)
    path.write_text(text + "\n", encoding="utf-8")
    return path
