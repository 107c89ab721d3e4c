"""Kill runs at random moments, resume them until they are done, compare with straight ones.

    python benchmarks/kill_runs.py --kills 200

A tiny training (folder of pictures, AdamW, weight average, mixup, accumulation, evaluation and
saving within epochs) runs straight for each number of loader processes. Then victims run: each life
of a victim is ended by SIGKILL, at a random pass of a random point of the program (of a save, a
step, an evaluation, a logged row, a resumption) or after a random time, and the next one resumes by
`--resume auto`; after its share of kills a victim may finish. Its final weights, optimizer, weight
average, logged values and sample order must then be those of the straight run, bit for bit. Some of
the lives are fresh processes of the command, the others forks of one that has imported torch.

Exits with 1 where anything differs, a process is left or something stays in shared memory. The
result goes to benchmarks/results/kill-runs_cpu-1-threads_<torch>_<date>.json.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for a test that imports this file

from lives import Life, begin, begin_fresh, shared_memory_names, warm_up
from reliability_result import RESULTS, write_result
from tiny_training import (
    STEPS,
    differences,
    expected_digests,
    newest_version,
    write_configuration,
    write_pictures,
)

from training_framework.checkpoint import load_checkpoint
from training_framework.faults import POINTS

KILLS_OF_A_VICTIM = 10
LIVES_PER_FRESH_ONE = 10
MOST_PASSES = 4
SECONDS_TO_BE_GONE = 30.0


class Victims:
    """The runs of one number of loader processes.

    Args:
        folder: For configuration, runs and what they print.
        pictures: What they train on.
        workers: Loader processes.
        draws: Where all that is random comes from.
        fresh: Whether every tenth life imports everything anew.
    """

    def __init__(
        self, folder: Path, pictures: Path, *, workers: int, draws: random.Random, fresh: bool
    ) -> None:
        self._folder = folder
        self._workers = workers
        self._draws = draws
        self._fresh = fresh
        self._config = folder / "config.yaml"
        folder.mkdir()
        write_configuration(
            self._config, pictures, num_workers=workers, output_dir=str(folder / "runs")
        )
        self._numbers = 0
        self.lives: list[Life] = []
        self.places: Counter[str] = Counter()
        self.faults: list[str] = []
        self._straight = self._finish("straight")
        self._typical_seconds = self.lives[-1].seconds
        self._check_samples(self._straight)

    def run_one(self, kills: int) -> int:
        """Kill a new victim so many times, let it finish, and compare. Returns the kills."""
        self._numbers += 1
        name, killed = f"victim-{self._numbers}", 0
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
        for line in self._faults_of(self._folder / "runs" / name):
            self._fault(name, line)
        return killed

    def _faults_of(self, runs: Path) -> list[str]:
        """What is wrong with the versions of a victim.

        One that was killed before its first checkpoint is left, and so is one that was killed when
        all was done; a new version follows in either case.
        """
        faults = []
        for version in runs.glob("version_*"):
            if (version / "checkpoints" / "last.ckpt").exists():
                faults += [
                    f"{version.name}: {line}" for line in differences(self._straight, version)
                ]
            elif version == newest_version(runs):
                faults.append(f"{version.name}: no checkpoint although it ended")
        return faults

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
            passes = 1 if place.startswith("resume.") else self._draws.randint(1, MOST_PASSES)
            fault = f"{place}:{passes}:kill"
        log = self._folder / f"{name}-{len(self.lives)}.log"
        arguments = ["train", f"--config={self._config}", f"--name={name}", "--resume=auto"]
        fresh = self._fresh and not kill_after and len(self.lives) % LIVES_PER_FRESH_ONE == 9
        life = (begin_fresh if fresh else begin)(arguments, log, fault=fault)
        self.lives.append(life)
        return life.end(kill_after=kill_after)

    def _finish(self, name: str) -> Path:
        status = self._live(name, None)
        if status != 0:
            raise RuntimeError(f"{name} ended with status {status}:\n{self.lives[-1].said()}")
        return newest_version(self._folder / "runs" / name)

    def _check_samples(self, run: Path) -> None:
        progress = load_checkpoint(run / "checkpoints" / "last.ckpt")["progress"]
        digests = [epoch["sample_digest"] for epoch in progress["epochs"]]
        if progress["step"] != STEPS or digests != expected_digests():
            self.faults.append(f"straight, {self._workers} workers: not each sample once an epoch")

    def _fault(self, name: str, line: str) -> None:
        self.faults.append(f"{self._workers} workers, {name}: {line}; {self.lives[-1].said()}")


def orphans_gone(lives: list[Life]) -> tuple[float, list[int]]:
    """Seconds until no process of these lives is left, and those that are left after 30 s."""
    start = time.monotonic()
    sessions = {life.pid for life in lives}
    while True:
        left = [p.pid for life in lives for p in life.orphans()] if sessions else []
        waited = time.monotonic() - start
        if not left or waited > SECONDS_TO_BE_GONE:
            return waited, left
        time.sleep(0.2)


def kill_runs(kills: int, *, seed: int, workers: list[int], fresh: bool) -> dict[str, Any]:
    """Run everything in a temporary folder, and return what was found."""
    warm_up()
    in_shared_memory = shared_memory_names()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-runs-") as temporary:
        folder = Path(temporary)
        pictures = write_pictures(folder / "pictures")
        parts = [
            Victims(folder / f"{n}-workers", pictures, workers=n,
                    draws=random.Random(f"{seed} {n}"), fresh=fresh)
            for n in workers
        ]  # fmt: skip
        done = victims = 0
        while done < kills:
            for part in parts:
                if done < kills:
                    done += part.run_one(min(KILLS_OF_A_VICTIM, kills - done))
                    victims += 1
                    print(f"{done} kills, {victims} runs", file=sys.stderr)
        lives = [life for part in parts for life in part.lives]
        seconds_to_be_gone, orphans = orphans_gone(lives)
    left = sorted(shared_memory_names() - in_shared_memory)
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
        "left_in_shared_memory": left,
        "longest_life_seconds": max(life.seconds for life in lives),
        "seconds": time.monotonic() - started,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs in all (200)")
    parser.add_argument("--seed", type=int, default=0, help="draws victims and moments (0)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2],
                        help="loader processes of the runs (0 1 2)")  # fmt: skip
    parser.add_argument("--forks-only", action="store_true", help="no fresh process, to be fast")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the result")
    options = parser.parse_args()
    found = kill_runs(
        options.kills, seed=options.seed, workers=options.workers, fresh=not options.forks_only
    )
    path = write_result("kill-runs", options.output, found)
    for fault in found["faults"]:
        print(fault)
    print(f"{found['kills']} kills in {found['lives']} lives of {found['finished_victims']} runs: "
          f"{len(found['faults'])} faults, {len(found['orphans'])} orphans, "
          f"{len(found['left_in_shared_memory'])} files left in shared memory; "
          f"{found['seconds']:.0f} s")  # fmt: skip
    print(path)
    return 1 if found["faults"] or found["orphans"] or found["left_in_shared_memory"] else 0


if __name__ == "__main__":
    sys.exit(main())
