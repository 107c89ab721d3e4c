"""Whether training still computes the same bits: record them once, check them after a change.

    python benchmarks/same_bits.py record
    python benchmarks/same_bits.py check

Fourteen trainings of 30 steps each (same_bits_trainings.py) run in processes of their own. The
record holds each step's loss, the validation losses and a digest of the final weights. The bits
depend on the processor and on torch, so each pair of them has its own file:
results/same-bits/<cpu>_<torch>.json. They do not depend on how busy the machine is. `check` prints
one line for each difference. Exit status: 0 all equal, 1 differences or a failed training,
2 nothing recorded for this machine.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from same_bits_trainings import ROOT, TRAININGS, Outcome, TrainingFailedError, run_training

__all__ = ["compare", "main", "read_record", "record_path", "write_record"]

RECORDS = Path(__file__).parent / "results" / "same-bits"
PACKAGES = ("torch", "numpy", "pillow", "simplejpeg", "safetensors", "scikit-learn")
CPU_FIELDS = ("model name", "cpu family", "model")


def compare(recorded: Mapping[str, Outcome], found: Mapping[str, Outcome | str]) -> list[str]:
    """One line for each difference; none if everything is equal.

    Args:
        recorded: Outcomes by name of the training.
        found: The outcomes now; a string says why a training failed.
    """
    differences = []
    for name in [*recorded, *(name for name in found if name not in recorded)]:
        then, now = recorded.get(name), found.get(name)
        if isinstance(now, str):
            differences.append(f"{name}: failed: {now}")
        elif now is None:
            differences.append(f"{name}: recorded, but was not run")
        elif then is None:
            differences.append(f"{name}: was run, but is not recorded")
        else:
            differences += [f"{name}: {line}" for line in _outcome_differences(then, now)]
    return differences


def _outcome_differences(then: Outcome, now: Outcome) -> list[str]:
    lines = [
        _loss_difference("loss", "step", then.losses, now.losses),
        _loss_difference("validation loss", "evaluation", then.val_losses, now.val_losses),
    ]
    if then.weights_sha256 != now.weights_sha256:
        lines.append(
            f"final weights: digest {then.weights_sha256[:12]} recorded, "
            f"{now.weights_sha256[:12]} now"
        )
    return list(filter(None, lines))


def _loss_difference(what: str, count: str, then: Sequence[str], now: Sequence[str]) -> str:
    if len(then) != len(now):
        return f"{what}: {len(then)} recorded, {len(now)} now"
    differing = [
        place for place, pair in enumerate(zip(then, now, strict=True)) if len({*pair}) > 1
    ]
    if not differing:
        return ""
    first = differing[0]
    values = [float.fromhex(side[first]) for side in (then, now)]
    return (
        f"{what} of {count} {first + 1}: {values[0]:.9g} recorded, {values[1]:.9g} now "
        f"({len(differing)} of {len(then)} differ)"
    )


def record_path(folder: Path = RECORDS) -> Path:
    """The file for this kind of processor and this version of torch."""
    release = importlib.metadata.version("torch").partition("+")[0]
    name = re.sub(r"[^a-z0-9]+", "-", _cpu().lower()).strip("-")
    return folder / f"{name}_{release}.json"


def _cpu() -> str:
    """Name, family and model, since clouds give the same name to different processors."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    fields = dict(re.findall(r"^([^\t:]+)\t*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    known = [fields[name] for name in CPU_FIELDS if name in fields]
    return " ".join(known) or platform.processor() or platform.machine()


def _conditions() -> dict[str, str]:
    """What else can change the bits."""
    compiler = shutil.which("c++") or shutil.which("g++")
    command = [compiler, "-dumpfullversion"] if compiler else ["true"]
    version = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "c library": "-".join(platform.libc_ver()),
        "c++ compiler": version or "none",
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _run_all(names: Sequence[str]) -> dict[str, Outcome | str]:
    """Run the named trainings one after the other, with a line for each."""
    found: dict[str, Outcome | str] = {}
    for number, name in enumerate(names, start=1):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[name] = run_training(TRAININGS[name], Path(folder))
            except TrainingFailedError as failure:
                found[name] = str(failure)
        seconds, ended = time.perf_counter() - start, "failed"
        if isinstance(outcome := found[name], Outcome):
            ended = f"weights {outcome.weights_sha256[:12]}"
        print(f"{number:2}/{len(names)} {name}: {ended}, {seconds:.1f} s", flush=True)
    return found


def _inner_differences(found: Mapping[str, Outcome | str]) -> list[str]:
    """Differences between trainings that must equal each other."""
    lines = []
    for name, outcome in found.items():
        other = found.get(TRAININGS[name].equals)
        if isinstance(outcome, Outcome) and isinstance(other, Outcome):
            same = compare({name: other}, {name: outcome})
            lines += [f"{line} (recorded: {TRAININGS[name].equals})" for line in same]
    return lines


def _record(without: Sequence[str]) -> int:
    found = _run_all([name for name in TRAININGS if name not in without])
    failures = [line for line in compare({}, found) if ": failed: " in line]
    if faults := failures + _inner_differences(found):
        print(*faults, "nothing is recorded", sep="\n", file=sys.stderr)
        return 1
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    head = {
        "experiment": "same-bits",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": described.stdout.strip(),
        "conditions": _conditions(),
        "without": list(without),
    }
    outcomes = {name: outcome for name, outcome in found.items() if isinstance(outcome, Outcome)}
    write_record(record_path(), head, outcomes)
    print(f"recorded in {record_path().relative_to(ROOT)}")
    return 0


def write_record(path: Path, head: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> None:
    """Write a record with one line for each training, so that a diff shows which changed."""
    rows = ",\n".join(
        f'  "{name}": {json.dumps(asdict(outcome))}' for name, outcome in outcomes.items()
    )
    text = json.dumps(head, indent=1).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{text},\n "trainings": {{\n{rows}\n }}\n}}\n', encoding="utf-8")


def read_record(path: Path) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """The whole record, and its outcomes by name of the training."""
    record = json.loads(path.read_text(encoding="utf-8"))
    outcomes = {
        name: Outcome(
            losses=tuple(values["losses"]),
            val_losses=tuple(values["val_losses"]),
            weights_sha256=values["weights_sha256"],
        )
        for name, values in record["trainings"].items()
    }
    return record, outcomes


def _check(only: Sequence[str], records: Path) -> int:
    path = record_path(records)
    if not path.exists():
        print(f"no {path.name} for this machine and torch: run `record` before the change")
        return 2
    record, recorded = read_record(path)
    for name, now in _conditions().items():
        if (then := record["conditions"].get(name)) != now:
            print(
                f"note: recorded with {name} {then}, this is {now}: bits may differ by that alone"
            )
    names = only or [name for name in TRAININGS if name not in record["without"]]
    if only:
        recorded = {name: outcome for name, outcome in recorded.items() if name in only}
    found = _run_all(names)
    differences = compare(recorded, found) + _inner_differences(found)
    print(*differences or [f"the same bits in all of {len(names)} trainings"], sep="\n")
    return 1 if differences else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description="the same bits as before?")
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record", help="run all trainings, and write their outcomes")
    record.add_argument(
        "--without", nargs="+", default=[], choices=TRAININGS, metavar="NAME",
        help="trainings that this machine cannot run",
    )  # fmt: skip
    check = commands.add_parser("check", help="run them again, and compare with the record")
    check.add_argument(
        "--only", nargs="+", default=[], choices=TRAININGS, metavar="NAME", help="these alone"
    )
    check.add_argument("--records", type=Path, default=RECORDS, help="folder of the records")
    options = parser.parse_args(arguments)
    if options.command == "record":
        return _record(options.without)
    return _check(options.only, options.records)


if __name__ == "__main__":
    sys.exit(main())
