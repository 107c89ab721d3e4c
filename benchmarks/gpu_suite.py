"""Everything worth measuring on a machine with a GPU that is lent for minutes.

    python benchmarks/gpu_suite.py --list
    python benchmarks/gpu_suite.py --output DIR --part 1         # under 9 minutes, as every part
    python benchmarks/gpu_suite.py --output DIR --part 4 --cifar10 DIR
    python benchmarks/gpu_suite.py --output DIR                  # all parts, one after the other
    python benchmarks/gpu_suite.py --output DIR --accelerator cpu --small    # try it without a GPU

The machine needs Python 3.11 or newer, PyTorch with CUDA and NumPy; no network, no git, no pip.
Collect the other packages before, where there is a network: benchmarks/collect_wheels.py.

All results go to DIR: a JSON file of each measurement, DIR/logs, DIR/ledger.json with the state of
each task, and a page of it all, DIR/index.html. What only the work needs is in DIR/scratch: leave
that out when you carry DIR away (tar --exclude=scratch). A part that runs again goes on where it
was: what is done stays, and an unfinished comparison is resumed.

A task that fails or runs out of time does not stop the others. Exits with 0 if all tasks of the
chosen parts are done, and with 1 otherwise.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for a test that imports this file

from bare_machine import environment_for, unpack_wheels
from gpu_parts import Options, Part, Task, parts

__all__ = ["Suite", "main"]

ROOT = Path(__file__).parent.parent
WHEELS = Path(__file__).parent / "wheels"
PACKAGES = (
    "numpy",
    "PIL",
    "psutil",
    "pydantic",
    "safetensors",
    "simplejpeg",
    "torch",
    "tqdm",
    "yaml",
)
SECONDS_FOR_THE_PAGE = 40.0
SECONDS_TO_STOP = 20.0
LINES_SHOWN = 24


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for all results")
    parser.add_argument("--part", type=int, nargs="+", help="numbers of parts (all)")
    parser.add_argument("--only", nargs="+", metavar="TASK", help="of these parts, these tasks")
    parser.add_argument("--list", action="store_true", help="list the parts and their tasks")
    parser.add_argument("--accelerator", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the suite")
    parser.add_argument("--cifar10", type=Path, help="folder with cifar-10-batches-py")
    parser.add_argument("--config", default="", help="recipe to train to 94% (cifar10-94)")
    parser.add_argument("--minutes", type=float, default=8.5, help="limit of a part (8.5)")
    parser.add_argument("--wheels", type=Path, default=WHEELS, help="(benchmarks/wheels)")
    parser.add_argument("--commit", default="", help="what the page names as the sources' commit")
    options = parser.parse_args(arguments)
    chosen = parts(
        Options(
            accelerator=options.accelerator,
            small=options.small,
            cifar10="scratch/cifar10" if options.cifar10 else "",
            recipe=recipe_for_tasks(options.config),
            lightning=importlib.util.find_spec("pytorch_lightning") is not None,
        )
    )
    numbers = options.part or list(range(1, len(chosen) + 1))
    if options.list:
        print("\n".join(listing(chosen)))
        return 0
    if options.output is None:
        parser.error("give --output DIR")
    if not all(1 <= number <= len(chosen) for number in numbers):
        parser.error(f"--part: the parts are 1 to {len(chosen)}")
    names = {task.name for number in numbers for task in chosen[number - 1].tasks}
    if unknown := sorted(set(options.only or ()) - names):
        parser.error(f"--only: these parts have no task {', '.join(unknown)}; see --list")
    if options.cifar10 and not (options.cifar10 / "cifar-10-batches-py").is_dir():
        parser.error(f"--cifar10: {options.cifar10} has no folder cifar-10-batches-py")
    try:
        return run_parts(options, {number: chosen[number - 1] for number in numbers})
    except OSError as error:  # no place for the results, or no more
        print(f"error: {error}; free space, or choose another --output", file=sys.stderr)
    except (zipfile.BadZipFile, zlib.error) as error:
        print(f"error: a file in {options.wheels} is damaged: {error}", file=sys.stderr)
    return 2


def run_parts(options: argparse.Namespace, chosen: Mapping[int, Part]) -> int:
    """Run the parts by their numbers; returns the exit status."""
    suite = Suite(options.output.resolve(), options.wheels, data=options.cifar10)
    suite.note(commit=options.commit, accelerator=options.accelerator, small=options.small)
    missing = suite.missing_packages()
    if missing:
        print(
            f"error: this Python has no {', '.join(missing)}; run benchmarks/collect_wheels.py "
            f"where there is a network, and bring the folder {options.wheels}",
            file=sys.stderr,
        )
        return 2
    done = True
    for number, part in chosen.items():
        wanted = [task for task in part.tasks if options.only is None or task.name in options.only]
        if wanted:
            wanted_part = Part(title=part.title, tasks=tuple(wanted))
            done = suite.run(number, wanted_part, options.minutes) and done
    return int(not done)


def recipe_for_tasks(config: str) -> str:
    """A file as tasks can find it, which run in another folder; names of recipes stay."""
    file = Path(config)
    return str(file.resolve()) if file.is_file() else config


def listing(chosen: Sequence[Part]) -> list[str]:
    """The parts and their tasks, for people."""
    lines = []
    for number, part in enumerate(chosen, 1):
        lines.append(f"{number}  {part.title}")
        lines += [f"     {task.name}: {task.proves}" for task in part.tasks]
    return lines


class Suite:
    """Runs parts, and keeps their results and the ledger in one folder.

    Args:
        folder: Where everything goes.
        wheels: Packages that this machine may lack.
        data: Folder with cifar-10-batches-py.
    """

    def __init__(self, folder: Path, wheels: Path, *, data: Path | None = None) -> None:
        self._folder, self._scratch = folder, folder / "scratch"
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        site = self._scratch / "site"
        unpack_wheels(wheels, site)
        self._environment = environment_for(site, ROOT, self._scratch)
        self._file = folder / "ledger.json"
        self._ledger: dict[str, Any] = {"tasks": {}}
        if self._file.exists():
            self._ledger = self._kept_ledger()
        if data is not None:
            link = self._scratch / "cifar10"
            link.unlink(missing_ok=True)
            link.symlink_to(data.resolve())

    def _kept_ledger(self) -> dict[str, Any]:
        """The ledger of earlier parts; one that cannot be read is set aside."""
        try:
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            if isinstance(kept, dict) and isinstance(kept["tasks"], dict):
                return kept
        except (KeyError, ValueError):
            pass
        aside = _unused(self._file)
        self._file.rename(aside)
        print(f"note: {self._file} is no ledger; it is {aside.name} now, and all tasks run again")
        return {"tasks": {}}

    def note(self, *, accelerator: str, **facts: Any) -> None:
        """Keep facts about this run of the suite in the ledger."""
        self._ledger |= {"accelerator": accelerator, **facts}
        if accelerator == "cpu":
            self._environment["CUDA_TESTS_ON"] = "cpu"  # see tests/gpu/test_on_cuda.py
        self._save()

    def missing_packages(self) -> list[str]:
        """Names of packages that cannot be imported here."""
        program = (
            "import importlib.util, sys\n"
            "print(*(n for n in sys.argv[1:] if importlib.util.find_spec(n) is None))"
        )
        found = subprocess.run(
            [sys.executable, "-c", program, *PACKAGES],
            env=self._environment, cwd=self._folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return found.stdout.split()

    def run(self, number: int, part: Part, minutes: float) -> bool:
        """Run a part's tasks that are not done yet, then write the page.

        Args:
            number: The part's number, for the ledger.
            part: The part.
            minutes: Its limit, the page included.

        Returns:
            Whether all its tasks are done, or cannot run on this machine.
        """
        print(f"== part {number}: {part.title}", flush=True)
        deadline = time.monotonic() + 60 * minutes - SECONDS_FOR_THE_PAGE
        for task in part.tasks:
            if self._is_done(task):
                print(f"{task.name}: done before", flush=True)
                continue
            before = self._ledger["tasks"].get(task.name, {})
            entry = self._ledger["tasks"][task.name] = {
                "part": number,
                "proves": task.proves,
                "command": list(task.command),
                "result": task.result,
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "status": "running",  # this stays if the machine is taken away
                "seconds": 0.0,
            }
            self._save()
            entry |= self._outcome(task, before.get("command"), deadline)
            self._save()
            print(f"{task.name}: {entry['status']}, {entry['seconds']:.0f} s", flush=True)
            self._show_end_of_log(task)
        states = {self._ledger["tasks"][task.name]["status"] for task in part.tasks}
        return self._write_page() and states <= {"done", "not available"}

    def _is_done(self, task: Task) -> bool:
        entry = self._ledger["tasks"].get(task.name, {})
        return entry.get("status") == "done" and entry["command"] == list(task.command)

    def _outcome(
        self, task: Task, earlier_command: list[str] | None, deadline: float
    ) -> dict[str, Any]:
        """Run a task, or resume it if this command began it: status, seconds, exit status."""
        if task.missing:
            return {"status": "not available", "reason": task.missing, "seconds": 0.0}
        result = self._folder / task.result
        if task.resume and result.is_file():
            if earlier_command == list(task.command):
                resumed = self._process(task, task.resume, deadline)
                if resumed["status"] != "failed":
                    return resumed
            # It was made with other settings or on another machine.
            result.rename(_unused(result))
        return self._process(task, task.command, deadline)

    def _process(self, task: Task, command: Sequence[str], deadline: float) -> dict[str, Any]:
        limit = min(60 * task.minutes, deadline - time.monotonic())
        if limit <= 0:
            return {"status": "no time left", "seconds": 0.0}
        started, cut_off = time.monotonic(), False
        with (self._folder / "logs" / f"{task.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=self._folder, env=self._environment,
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                cut_off = True
            finally:
                _stop(process)
        status = "cut off" if cut_off else "failed" if process.returncode else "done"
        seconds = time.monotonic() - started
        return {"status": status, "exit": process.returncode, "seconds": seconds}

    def _show_end_of_log(self, task: Task) -> None:
        log = self._folder / "logs" / f"{task.name}.log"
        if log.exists():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(f"    {line}" for line in lines[-LINES_SHOWN:]), flush=True)

    def _write_page(self) -> bool:
        page = Path(__file__).parent / "gpu_page.py"
        done = subprocess.run(
            [sys.executable, str(page), str(self._folder)],
            env=self._environment, cwd=self._folder, timeout=300, check=False,
        )  # fmt: skip
        return done.returncode == 0

    def _save(self) -> None:
        partial = self._file.with_suffix(".part")
        partial.write_text(json.dumps(self._ledger, indent=1) + "\n", encoding="utf-8")
        partial.replace(self._file)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process that still runs: first as Ctrl-C would, so that it keeps what it has."""
    for number, patience in ((signal.SIGINT, SECONDS_TO_STOP), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def _unused(path: Path) -> Path:
    """A free name for a file that is set aside; the page does not show it."""
    number = 1
    while (aside := path.with_suffix(f".old-{number}")).exists():
        number += 1
    return aside


if __name__ == "__main__":
    # As Ctrl-C does: the task that runs is stopped, and can be resumed.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    sys.exit(main())
