"""The framework's own cost per step, beside a bare torch loop that does the same work.

    python benchmarks/step_overhead.py --threads 1

Both sides train the same tiny network on the same batches with the same fused SGD, from images that
are on the device as bytes. They must end with the same weights. Whatever the framework does beyond
the bare loop is its own cost: it draws the order, counts loss and hits, reads the schedule, listens
for signals, measures times, memory and gradient norm, and logs to a CSV file at the default
interval.

Both take turns in one process (bare, framework, framework, bare). The bare loop also takes turns
with itself, as an A/A control. The answer is the difference per step, as the median over the
rounds. The result goes to benchmarks/results/step-overhead_<device>_<torch>_<date>.json.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from reliability_result import RESULTS, write_result
from torch import nn

from training_framework.config import TrainConfig
from training_framework.config.loading import config_to_dict
from training_framework.data import Dataset
from training_framework.data.augmentation import scale_and_shift
from training_framework.loggers import CsvLogger, LoggerGroup
from training_framework.machine.hardware import detect_hardware
from training_framework.plan import plan_run
from training_framework.runs.progress import Progress
from training_framework.training.network_assembly import prepare_network
from training_framework.training.outputs import Outputs
from training_framework.training.parts import build_parts, build_step
from training_framework.training.trainer import Trainer

IMAGE_SIZE = 8
NUM_CLASSES = 10
CLOCK = (
    "seconds of one epoch, device synchronized before both readings; bare: gather, normalization, "
    "forward, loss, backward, update of every step; framework: Trainer.fit(), so also the order of "
    "the epoch, metrics, gradient norm, learning rate, stop signals and rows of the CSV file; "
    "building network, optimizer, loader and logger is outside"
)
LIMIT_MICROSECONDS = 100.0
LIMIT_SHARE = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch (1)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds (20)")
    parser.add_argument("--steps", type=int, default=200, help="steps of each turn (200)")
    parser.add_argument("--batch-size", type=int, default=64, help="images of a step (64)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = TrainConfig(
        data="synthetic",
        img_size=IMAGE_SIZE,
        num_classes=NUM_CLASSES,
        synthetic_train_images=options.steps * options.batch_size,
        synthetic_val_images=NUM_CLASSES,
        batch_size=options.batch_size,
        epochs=1,
        lr=0.001,
        scheduler="constant",
        precision="32",
        flip="none",
        crop_padding=0,
        resident_data=True,
        compile=False,
        threads=options.threads,
        accelerator="gpu" if options.device == "cuda" else "cpu",
    )
    result = compare(config, rounds=options.rounds)
    on_cpu = result["device"] == "cpu"
    device = f"cpu-{options.threads}-threads" if on_cpu else result["device_name"]
    label = "-".join(device.lower().split())
    path = write_result("step-overhead", options.output, result, device=label)
    print("\n".join(readable(result)))
    print(path)


class Comparison:
    """Both sides, built once, with equal networks, optimizers and batches.

    Attributes:
        steps: Steps of one turn.
        device: Where both sides compute.
    """

    def __init__(self, config: TrainConfig) -> None:
        planned = plan_run(config, own_network="Sequential")
        self._plan, facts, dataset = planned.plan, planned.facts, planned.source
        self.steps = self._plan.total_steps
        self._parts = build_parts(planned, network=tiny_network(config.seed))
        self._parts.loaders.val = None  # an evaluation is not part of a step
        self.device = self._parts.device
        bare = prepare_network(self._plan, tiny_network(config.seed), self.device)
        self._bare = build_step(self._plan, bare, self.device)
        assert isinstance(dataset, Dataset)
        arrays = dataset.train.array(self.device)
        # NHWC, since a gather of channels_last images would return contiguous ones.
        self._pixels = arrays.images.permute(0, 2, 3, 1).contiguous()
        self._labels = arrays.labels
        scale, shift = scale_and_shift(facts.mean, facts.std, self.device)
        self._scale, self._shift = scale.repeat(IMAGE_SIZE), shift.repeat(IMAGE_SIZE)
        self._order = [batch.indices.clone() for batch in self._parts.loaders.train.epoch(0)]

    def bare(self) -> float:
        """Seconds of one epoch of the bare loop."""
        model, optimizer = self._bare.model, self._bare.optimizer
        smoothing = self._plan.label_smoothing
        model.train()
        start = self._now()
        for indices in self._order:
            pixels = self._pixels.index_select(0, indices)
            rows = pixels.view(-1, len(self._scale)).float()
            torch.addcmul(self._shift, rows, self._scale, out=rows)
            logits = model(rows.view(pixels.shape).permute(0, 3, 1, 2))
            labels = self._labels.index_select(0, indices)
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self._now() - start

    def framework(self) -> float:
        """Seconds of one epoch of the framework's trainer."""
        with (
            tempfile.TemporaryDirectory() as folder,
            closing(CsvLogger(Path(folder) / "metrics.csv")) as logger,
        ):
            trainer = Trainer(
                plan=self._plan,
                parts=self._parts,
                outputs=Outputs(loggers=LoggerGroup([logger])),
                progress=Progress(),
            )
            start = self._now()
            trainer.fit()
            return self._now() - start

    def largest_weight_difference(self) -> float:
        """Between the two sides, relative to the largest weight; both should have done the same."""
        ours, theirs = (
            torch.cat([parameter.detach().flatten() for parameter in step.model.parameters()])
            for step in (self._parts.step, self._bare)
        )
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def tiny_network(seed: int = 0) -> nn.Module:
    """Two linear layers: so little work that the loop around them shows."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3 * IMAGE_SIZE**2, 32),
        nn.ReLU(),
        nn.Linear(32, NUM_CLASSES),
    )


def compare(config: TrainConfig, *, rounds: int) -> dict[str, Any]:
    """Measure both sides and the control, in turns, and judge the differences."""
    sides = Comparison(config)
    sides.bare()
    sides.framework()
    difference = sides.largest_weight_difference()
    assert difference < 1e-5, f"the sides did different work: weights differ by {difference:.1e}"
    load_before, busy_before = os.getloadavg()[0], _busy_seconds()
    start = time.perf_counter()
    turns = [_round(sides) for _ in range(rounds)]
    seconds = time.perf_counter() - start
    others = (_busy_seconds() - busy_before) / seconds
    per_step = 1e6 / sides.steps
    bare = [per_step * (turn["bare"][0] + turn["bare"][1]) / 2 for turn in turns]
    overhead = [per_step * _difference(turn["framework"], turn["bare"]) for turn in turns]
    control = [per_step * _difference(turn["control"], turn["bare"]) for turn in turns]
    return {
        "clock": CLOCK,
        "limit": "at most 3% or 100 microseconds a step",
        "device": sides.device.type,
        "device_name": _device_name(sides.device),
        "network": str(tiny_network()),
        "dataset": "synthetic",
        "config": config_to_dict(config),
        "rounds": rounds,
        "steps_per_turn": sides.steps,
        "warm_up": "one turn of each side, dropped",
        "load_average_before": load_before,
        "other_busy_cores": others,
        "largest_relative_weight_difference": difference,
        "bare_microseconds_per_step": float(np.median(bare)),
        "overhead_microseconds_per_step": median_with_interval(overhead),
        "overhead_share": float(np.median(overhead) / np.median(bare)),
        "control_microseconds_per_step": median_with_interval(control),
        "turn_seconds": turns,
    }


def _round(sides: Comparison) -> dict[str, list[float]]:
    """Seconds of the turns: bare, framework, framework, bare, with the control around them."""
    control, bare, framework = [sides.bare()], [sides.bare()], [sides.framework()]
    framework.append(sides.framework())
    bare.append(sides.bare())
    control.append(sides.bare())
    return {"bare": bare, "framework": framework, "control": control}


def _difference(turns: Sequence[float], against: Sequence[float]) -> float:
    return float(np.mean(turns) - np.mean(against))


def median_with_interval(differences: Sequence[float], *, resamples: int = 10_000) -> list[float]:
    """The median, and the ends of its bootstrap 95% interval (percentile method)."""
    values = np.asarray(differences)
    draws = np.random.default_rng(0).integers(0, len(values), size=(resamples, len(values)))
    low, high = np.quantile(np.median(values[draws], axis=1), [0.025, 0.975])
    return [float(np.median(values)), float(low), float(high)]


def _busy_seconds() -> float:
    """CPU seconds that all other processes have used."""
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    return sum(times) - idle - getattr(times, "guest", 0.0) - own.user - own.system


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else detect_hardware().cpu_name
    )


def readable(result: dict[str, Any]) -> list[str]:
    """The result in a few lines."""
    median, low, high = result["overhead_microseconds_per_step"]
    aa_median, aa_low, aa_high = result["control_microseconds_per_step"]
    share = result["overhead_share"]
    held = median <= LIMIT_MICROSECONDS or share <= LIMIT_SHARE
    return [
        f"{result['device_name']}, torch {torch.__version__}, "
        f"{result['rounds']} rounds of {result['steps_per_turn']} steps",
        f"bare loop          {result['bare_microseconds_per_step']:7.1f} us a step",
        f"framework adds     {median:7.1f} us a step [{low:.1f}, {high:.1f}], {share:.1%}",
        f"A/A control        {aa_median:7.1f} us a step [{aa_low:.1f}, {aa_high:.1f}]",
        f"others kept {result['other_busy_cores']:.2f} cores busy",
        f"{'within' if held else 'above'} the limit: {result['limit']}",
    ]


if __name__ == "__main__":
    main()
