"""Runs are killed at random moments and resumed until they are done: they end as straight ones.

A tiny training (folder of images, AdamW, weight average, mixup, accumulation, evaluation and saving
within epochs) runs straight for each number of loader processes. Then victims run: each life of a
victim is ended by SIGKILL, at a random pass of a random point of the program (of a save, a step, an
evaluation, a logged row, a resumption) or after a random time, and the next one resumes by
`--resume auto`; after its share of kills a victim may finish. At full length some of the lives are
fresh processes of the command, the others forks of one that has imported torch.
"""

import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from experiment import run_experiment
from lives import Life, begin, begin_fresh, left_in_shared_memory, shared_memory_names, warm_up
from reliability_result import RESULTS, write_result
from tiny_training import (
    STEPS,
    differences,
    expected_digests,
    newest_version,
    write_configuration,
    write_images,
)

from training_framework.checkpoint import load_checkpoint
from training_framework.faults import POINTS

KILLS_OF_A_VICTIM = 10
LIVES_PER_FRESH_ONE = 10
MAX_PASSES = 4
SECONDS_TO_BE_GONE = 30.0


class Victims:
    """The runs of one number of loader processes, in a folder."""

    def __init__(
        self, folder: Path, images: Path, *, workers: int, draws: random.Random, fresh: bool
    ) -> None:
        self._folder, self._workers, self._draws, self._fresh = folder, workers, draws, fresh
        self._config = folder / "config.yaml"
        folder.mkdir()
        write_configuration(
            self._config, images, num_workers=workers, output_dir=str(folder / "runs")
        )
        self._count = 0
        self.lives: list[Life] = []
        self.places: Counter[str] = Counter()
        self.faults: list[str] = []
        status = self._live("straight", None)
        if status != 0:
            raise RuntimeError(f"status {status}:\n{self.lives[-1].said()}")
        self._straight = newest_version(folder / "runs" / "straight")
        self._typical_seconds = self.lives[-1].seconds
        progress = load_checkpoint(self._straight / "checkpoints" / "last.ckpt")["progress"]
        digests = [epoch["sample_digest"] for epoch in progress["epochs"]]
        if progress["step"] != STEPS or digests != expected_digests():
            self.faults.append(f"straight, {workers} workers: not each sample once an epoch")

    def run_one(self, kills: int) -> int:
        """Kill a new victim so many times, let it finish, and compare. Returns the kills."""
        self._count += 1
        name, killed = f"victim-{self._count}", 0
        while True:
            place = self._draw_place() if killed < kills else None
            status = self._live(name, place)
            if status == 0:  # it was done before the moment came
                break
            if place is None or status != -signal.SIGKILL:
                self._fault(name, f"status {status} when to be killed {place}")
                return killed
            killed += 1
            self.places[place if isinstance(place, str) else "at a random time"] += 1
        runs = self._folder / "runs" / name
        for version in runs.glob("version_*"):
            # One killed before its first checkpoint is left, and so is one killed when all was
            # done; a new version follows in either case.
            if (version / "checkpoints" / "last.ckpt").exists():
                for line in differences(self._straight, version):
                    self._fault(name, f"{version.name}: {line}")
            elif version == newest_version(runs):
                self._fault(name, f"{version.name}: no checkpoint although it ended")
        return killed

    def _draw_place(self) -> str | float:
        """A point of the program, of each part of it equally often, or seconds from the start."""
        if self._draws.random() < 0.4:
            return self._draws.uniform(0.0, 1.1 * self._typical_seconds)
        part = self._draws.choice(sorted({point.partition(".")[0] for point in POINTS}))
        return self._draws.choice(sorted(p for p in POINTS if p.startswith(f"{part}.")))

    def _live(self, name: str, place: str | float | None) -> int:
        """One process of a run: killed at a point, after seconds, or not at all."""
        fault, kill_after = "", None
        if isinstance(place, float):
            kill_after = place
        elif place is not None:
            passes = 1 if place.startswith("resume.") else self._draws.randint(1, MAX_PASSES)
            fault = f"{place}:{passes}:kill"
        log = self._folder / f"{name}-{len(self.lives)}.log"
        arguments = ["train", f"--config={self._config}", f"--name={name}", "--resume=auto"]
        fresh = self._fresh and not kill_after and len(self.lives) % LIVES_PER_FRESH_ONE == 9
        life = (begin_fresh if fresh else begin)(arguments, log, fault=fault)
        self.lives.append(life)
        return life.end(kill_after=kill_after)

    def _fault(self, name: str, line: str) -> None:
        self.faults.append(f"{self._workers} workers, {name}: {line}; {self.lives[-1].said()}")


def orphans_gone(lives: list[Life]) -> tuple[float, list[int]]:
    """Seconds until no process of these lives is left, and those that are left after 30 s."""
    start = time.monotonic()
    while True:
        left = [process.pid for life in lives for process in life.orphans()]
        waited = time.monotonic() - start
        if not left or waited > SECONDS_TO_BE_GONE:
            return waited, left
        time.sleep(0.2)


def kill_runs(kills: int, seed: int, workers: list[int], fresh: bool) -> dict[str, Any]:
    warm_up()
    in_shared_memory, started = shared_memory_names(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-runs-") as temporary:
        folder = Path(temporary)
        images = write_images(folder / "images")
        parts = [
            Victims(folder / f"{n}-workers", images, workers=n,
                    draws=random.Random(f"{seed} {n}"), fresh=fresh)
            for n in workers
        ]  # fmt: skip
        done = victims = 0
        while done < kills:
            for part in parts:
                if done < kills:
                    done += part.run_one(min(KILLS_OF_A_VICTIM, kills - done))
                    victims += 1
        lives = [life for part in parts for life in part.lives]
        seconds_to_be_gone, orphans = orphans_gone(lives)
    return {
        "kills": done,
        "seed": seed,
        "workers": workers,
        "steps_of_a_run": STEPS,
        "finished_victims": victims,
        "lives": len(lives),
        "kills_by_place": dict(sorted(sum((part.places for part in parts), Counter()).items())),
        "faults": [fault for part in parts for fault in part.faults],
        "orphans": orphans,
        "seconds_until_no_process_was_left": seconds_to_be_gone,
        "left_in_shared_memory": left_in_shared_memory(in_shared_memory),
        "longest_life_seconds": max(life.seconds for life in lives),
        "seconds": time.monotonic() - started,
    }


@pytest.mark.long
@pytest.mark.timeout(280)  # under 60 s on two free cores
def test_runs_that_are_killed_twenty_times_end_as_one_that_was_not(long):
    _check(20, workers=[0, 1, 2], long=long, long_kills=200, name="kill-runs")


@pytest.mark.long
def test_runs_with_two_workers_are_killed_a_hundred_times_at_length(long):
    if not long:
        pytest.skip("by --long; the test above kills runs with two workers too")
    _check(0, workers=[2], long=True, long_kills=100, name="kill-runs-two-workers")


def _check(kills: int, *, workers: list[int], long: bool, long_kills: int, name: str) -> None:
    kills = long_kills if long else kills
    found = run_experiment(kill_runs, kills=kills, seed=0, workers=workers, fresh=long)
    if long:
        write_result(name, RESULTS, found)
    assert found["kills"] == sum(found["kills_by_place"].values()) == kills
    assert not found["faults"]
    assert not found["orphans"]
    assert found["seconds_until_no_process_was_left"] < SECONDS_TO_BE_GONE
    assert not found["left_in_shared_memory"]
