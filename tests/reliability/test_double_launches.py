"""Two runs are started at once on one name, again and again: each directory has one writer.

Four situations take turns: a run that was stopped, continued by `--resume auto` or by the path of
its last.ckpt; a finished run; and a name that is new. Of two processes that want the same directory
one must win and finish as if it had been alone, and the other must leave at once with one line;
where each gets a version of its own, both must. No byte of an earlier run may change.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from experiment import run_experiment
from lives import Life, begin, end_fault, left_in_shared_memory, shared_memory_names, warm_up
from reliability_result import RESULTS, write_result
from tiny_training import differences, newest_version, write_configuration, write_images

SITUATIONS = ("stopped, by auto", "stopped, by its path", "finished", "new")
STOPPED_AFTER = 8  # where a row is logged anyway
LONGEST_REFUSAL_SECONDS = 5.0


class Launches:
    """Prepared runs in a folder, and what came of the launches on copies of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = folder / "config.yaml"
        write_configuration(self._config, write_images(folder / "images"), num_workers=0,
                            tensorboard=False)  # fmt: skip
        self._prepared = folder / "prepared"
        for name, *flags in (
            ("finished",),
            ("stopped",),
            ("stopped", "--resume=never", f"--stop-after-steps={STOPPED_AFTER}"),
        ):
            life = begin(self._arguments(self._prepared, name, *flags), folder / "prepared.log")
            if life.end() != 0:
                raise RuntimeError(life.said())
        self._straight = newest_version(self._prepared / "finished")
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.refusal_seconds: list[float] = []

    def _arguments(self, output: Path, name: str, *flags: str) -> list[str]:
        return ["train", f"--config={self._config}", f"--output-dir={output}", f"--name={name}",
                *flags]  # fmt: skip

    def launch(self, number: int) -> None:
        """Two processes at once, in the situation whose turn it is."""
        situation = SITUATIONS[number % len(SITUATIONS)]
        name = situation.partition(",")[0]
        output = self._folder / f"launch-{number}"
        if (self._prepared / name).is_dir():
            shutil.copytree(self._prepared / name, output / name, symlinks=True)
        else:
            output.mkdir()
        earlier = [output / name / "version_0"] if (output / name).is_dir() else []
        before = {path: digest_of_files(path) for path in earlier}
        flags = ["--resume=auto"]
        if situation == "stopped, by its path":
            last = newest_version(output / name) / "checkpoints" / "last.ckpt"
            flags = [f"--resume={last}"]
        statuses, lives = self._at_once(self._arguments(output, name, *flags), number)
        faults = self._judge(statuses, lives)
        finished = [path for path in (output / name).glob("version_*") if path not in before]
        if len(finished) != statuses.count(0):
            faults.append(f"{statuses.count(0)} finished, in {len(finished)} directories")
        faults += [line for path in finished for line in differences(self._straight, path)]
        faults += [
            f"{path.name} of an earlier run was changed"
            for path, digest in before.items()
            if digest_of_files(path) != digest
        ]
        self.faults += [f"{situation}: {fault}" for fault in faults]
        self.outcomes[f"{situation}: {' and '.join(map(str, sorted(statuses)))}"] += 1
        shutil.rmtree(output)

    def _at_once(self, arguments: list[str], number: int) -> tuple[list[int], list[Life]]:
        gate, opener = os.pipe()
        lives = [
            begin(arguments, self._folder / f"{number}-{side}.log", gate=gate) for side in "ab"
        ]
        time.sleep(0.02)  # until both wait at the gate
        os.write(opener, bytes(len(lives)))
        statuses = [life.end() for life in lives]
        os.close(gate)
        os.close(opener)
        return statuses, lives

    def _judge(self, statuses: list[int], lives: list[Life]) -> list[str]:
        """What is wrong with how the processes ended."""
        faults = []
        if 0 not in statuses:
            faults.append(f"nobody won: {[life.said() for life in lives]}")
        for status, life in zip(statuses, lives, strict=True):
            if status == 0:
                continue
            self.refusal_seconds.append(life.seconds)
            fault = end_fault(status, life.said())
            if not fault and life.seconds > LONGEST_REFUSAL_SECONDS:
                fault = f"it took {life.seconds:.1f} s to say: {life.said()}"
            faults += [fault] if fault else []
        return faults


def digest_of_files(folder: Path) -> str:
    """Of every file's name and bytes below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def double_launches(launches: int) -> dict[str, Any]:
    warm_up()
    in_shared_memory, started = shared_memory_names(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="double-launches-") as temporary:
        tried = Launches(Path(temporary))
        for number in range(launches):
            tried.launch(number)
    return {
        "launches": launches,
        "outcomes": dict(sorted(tried.outcomes.items())),
        "faults": tried.faults,
        "refusals": len(tried.refusal_seconds),
        "longest_refusal_seconds": max(tried.refusal_seconds, default=None),
        "left_in_shared_memory": left_in_shared_memory(in_shared_memory),
        "seconds": time.monotonic() - started,
    }


@pytest.mark.long
def test_of_two_runs_started_at_once_on_a_directory_one_writes(long):
    launches = 50 if long else 4
    found = run_experiment(double_launches, launches=launches)
    if long:
        write_result("double-launches", RESULTS, found)
    assert not found["faults"]
    assert sum(found["outcomes"].values()) == launches
    assert found["refusals"] >= launches // 2
