"""Does `compare` find a planted slowdown of 10%, and none where there is none?

Three variants of a tiny network take turns in processes of their own: plain, plain again (the A/A
control), and one that sleeps for a tenth of its time after every step. This is repeated --repeats
times, with a printed line each time. The exit status is 1 if `compare` missed a slowdown or found
one that does not exist. The result goes to benchmarks/results/ (or --output).

    python benchmarks/planted_slowdown.py --repeats 3

With --record FILE, one process instead takes many short samples, in turns, of three such variants
of a few convolutions, and writes them as CSV. The recorded samples in tests/measure/compare/ were
made this way.
"""

import argparse
import csv
import io
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training_framework.config import TrainConfig
from training_framework.measure.compare import workers
from training_framework.measure.compare.comparison import Comparison
from training_framework.measure.compare.environment import device_label
from training_framework.measure.compare.experiment import CONTROL, Experiment, Variant
from training_framework.measure.compare.result import Result, result_file_name, unused_path
from training_framework.measure.compare.timing import StepSampler
from training_framework.measure.compare.worker import main as answer_requests

RESULTS = Path(__file__).parent / "results"
PLANTED = 0.10
SLOWED = "slowed"
FOUND_FROM = 1.05
BASE: dict[str, Any] = {
    "data": "synthetic",
    "synthetic_train_images": 256,
    "synthetic_val_images": 16,
    "img_size": 8,
    "num_classes": 4,
    "model": "resnet10",
    "stem": "imagenet",
    "batch_size": 4,
    "lr": 0.01,
    "accelerator": "cpu",
    "precision": "32",
    "threads": 1,
}


class SlowedSampler(StepSampler):
    """Sleeps after each step, for a tenth of the step's time."""

    def optimizer_step(self) -> int:
        started = time.perf_counter()
        images = super().optimizer_step()
        time.sleep(PLANTED * (time.perf_counter() - started))
        return images


def experiment(rounds: int, seconds: float) -> Experiment:
    return Experiment(
        name="planted-slowdown",
        base=BASE,
        variants=(Variant(name="plain"), Variant(name=SLOWED)),
        rounds=rounds,
        seconds=seconds,
        warmup_steps=20,
    )


def open_worker(variant: Variant, config: TrainConfig, order: Any) -> workers.ProcessWorker:
    program = [__file__, "--worker"] + ["--slowed"] * (variant.name == SLOWED)
    return workers.ProcessWorker(
        config, order, environment={"OMP_NUM_THREADS": "1"}, program=program
    )


def run_live(repeats: int, rounds: int, seconds: float) -> tuple[list[dict[str, Any]], Result]:
    """What each repetition found, as ratios of times (not of speeds), and the last comparison."""
    runs = []
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            result = Comparison(
                experiment(rounds, seconds),
                path=Path(folder) / "result.json",
                command="",
                open_worker=open_worker,
                stream=io.StringIO(),
            ).run()
        ratios = {ratio.variant: ratio for ratio in result.ratios}
        slowed, control = ratios[SLOWED], ratios[CONTROL]
        assert slowed.low and slowed.high and control.low and control.high
        run: dict[str, Any] = {
            # The ratio is of speeds: a slowdown of 10% is 1 / 1.1.
            "slowdown": _inverse(slowed),
            "control": _inverse(control),
            "pairs": slowed.pairs,
            "found": 1 / slowed.high > FOUND_FROM,
            "control_found": 1 / control.high > FOUND_FROM,
        }
        runs.append(run)
        print(
            f"{repeat + 1}: slowdown {_shown(run['slowdown'])} "
            f"{'found' if run['found'] else 'MISSED'}; control {_shown(run['control'])} "
            f"{'FOUND' if run['control_found'] else 'not found'}",
            flush=True,
        )
    return runs, result


def _inverse(ratio: Any) -> dict[str, float]:
    return {"median": 1 / ratio.median, "low": 1 / ratio.high, "high": 1 / ratio.low}


def _shown(interval: dict[str, float]) -> str:
    return f"{interval['median']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def write_result(path: Path, runs: list[dict[str, Any]], last: Result) -> None:
    """The result file: the runs, and what a comparison says of the machine."""
    content = {
        "experiment": "planted-slowdown",
        "command": shlex.join(["python", "benchmarks/planted_slowdown.py", *sys.argv[1:]]),
        "started": last.started,
        "commit": last.commit,
        "environment": last.environment,
        "clock": last.clock,
        "planted": PLANTED,
        "found_from": FOUND_FROM,
        "runs": runs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(path)


def record(path: Path, pairs: int, steps: int) -> None:
    """Samples of steps that train three small convolutions; variants take turns in one process."""
    torch.set_num_threads(1)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 12)
    )
    images, optimizer = torch.randn(16, 3, 16, 16), torch.optim.SGD(network.parameters(), lr=1e-3)

    def sample(slowed: bool) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            network(images).square().mean().backward()
            optimizer.step()
        if slowed:
            time.sleep(PLANTED * (time.perf_counter() - started))
        return time.perf_counter() - started

    names = ["plain", "slowed", "control"]
    for _ in range(20):
        sample(slowed=False)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f"{name}_seconds" for name in names])
        for number in range(pairs):
            turns = names if number % 2 == 0 else names[::-1]
            seconds = {name: sample(slowed=name == "slowed") for name in turns}
            writer.writerow([f"{seconds[name]:.5f}" for name in names])


def main() -> int:
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--output", type=Path, metavar="FILE", help="result file (JSON)")
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument("--pairs", type=int, default=400, help="to record")
    parser.add_argument("--steps", type=int, default=8, help="of a recorded sample")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--slowed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        if options.slowed:
            workers.StepSampler = SlowedSampler  # type: ignore[misc]
        answer_requests()
        return 0
    if options.record is not None:
        record(options.record, options.pairs, options.steps)
        return 0
    runs, last = run_live(options.repeats, options.rounds, options.seconds)
    name = result_file_name("planted-slowdown", device_label(experiment(1, 1.0)), torch.__version__)
    write_result(options.output or unused_path(RESULTS / name), runs, last)
    return 0 if all(run["found"] and not run["control_found"] for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
