"""What saving costs: the same epochs with checkpoints and without them, in turns.

    python benchmarks/checkpoint_price.py --threads 2

Both sides train the configured network on the same synthetic images with Trainer.fit(), which ends
an epoch with a save; the clock stops when the save is on the disk. They take turns in one process
(without, with, with, without), and beside them the side without takes turns with itself as an A/A
control. The answer is the median over the rounds of what the saves add, as a share of the epoch
and in seconds a save; what a longer epoch would pay is that over its length. The result goes to
benchmarks/results/checkpoint-price_<device>_<torch>_<date>.json.
"""

import argparse
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for a test that imports this file

import numpy as np
import psutil
import torch
from reliability_result import RESULTS, write_result
from step_overhead import median_with_interval

from training_framework.assembly import (
    Loaders,
    assemble_schedule,
    assemble_step,
    open_configured_dataset,
)
from training_framework.checkpoint import CheckpointKeeper
from training_framework.config import TrainConfig
from training_framework.config.loading import config_to_dict
from training_framework.distributed import Processes
from training_framework.hardware import detect_hardware
from training_framework.loggers import LoggerGroup
from training_framework.network_assembly import assemble_network
from training_framework.plan import make_plan
from training_framework.progress import Progress
from training_framework.trainer import Trainer

CLOCK = (
    "seconds of one epoch, device synchronized before both readings: Trainer.fit() with its saves, "
    "until the last of them is on the disk; opening the data, building the network and removing "
    "the files are outside"
)


class Epochs:
    """Epochs of one configuration, with checkpoints and without.

    Args:
        config: What to train.
        every_n_steps: Steps between two saves beside the one at the end; None: that one alone.
        folder: Where checkpoints go.

    Attributes:
        steps: Of an epoch.
        device: Where it trains.
        checkpoint_bytes: Size of a checkpoint.
    """

    def __init__(self, config: TrainConfig, *, every_n_steps: int | None, folder: Path) -> None:
        processes = Processes()
        dataset = open_configured_dataset(config)
        self._config = config
        self._every_n_steps = every_n_steps
        self._folder = folder
        self._plan = make_plan(config, detect_hardware(), dataset.facts)
        self.steps = self._plan.total_steps
        self.device = self._plan.torch_device(0)
        self._loaders = Loaders.assemble(
            config, self._plan, dataset.facts, source=dataset, processes=processes,
            device=self.device,
        )  # fmt: skip
        torch.manual_seed(config.seed)
        model, _ = assemble_network(config, self._plan, self.device)
        self._step = assemble_step(config, self._plan, model, self.device)
        self.checkpoint_bytes = 0

    def without(self) -> float:
        """Seconds of an epoch that saves nothing."""
        return self._epoch(None)

    def with_saves(self) -> float:
        """Seconds of an epoch that ends with its checkpoint on the disk."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            keeper = CheckpointKeeper(
                Path(folder), prefix=self._config.model, keep=1, every_n_steps=self._every_n_steps
            )
            seconds = self._epoch(keeper)
            self.checkpoint_bytes = keeper.last.stat().st_size
        return seconds

    def _epoch(self, keeper: CheckpointKeeper | None) -> float:
        trainer = Trainer(
            plan=self._plan,
            step=self._step,
            loader=self._loaders.train,
            transform=self._loaders.train_transform,
            evaluate=None,
            schedule=assemble_schedule(self._config, self._plan),
            loggers=LoggerGroup([]),
            advance=lambda step: None,
            checkpoints=keeper,
            checkpoint_extras={"config": config_to_dict(self._config), "network": {}},
            progress=Progress(),
            flops_per_image=1.0,
            peak_flops=0.0,
            log_every_n_steps=self._config.log_every_n_steps,
            stop_after_steps=None,
            device=self.device,
            run_directory=None,
        )
        start = self._now()
        if keeper is None:
            trainer.fit()
        else:
            with closing(keeper):
                trainer.fit()
        return self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure(config: TrainConfig, *, rounds: int, every_n_steps: int | None) -> dict[str, Any]:
    """Measure in turns, and judge the differences."""
    with tempfile.TemporaryDirectory(prefix="checkpoint-price-") as temporary:
        epochs = Epochs(config, every_n_steps=every_n_steps, folder=Path(temporary))
        epochs.without()
        epochs.with_saves()
        load_before = psutil.getloadavg()[0]
        turns = [_round(epochs) for _ in range(rounds)]
    saves = 1
    if every_n_steps:  # one of them falls on the last step, which is saved once
        saves = epochs.steps // every_n_steps + (epochs.steps % every_n_steps > 0)
    plain = np.array([np.mean(turn["without"]) for turn in turns])
    added = np.array([np.mean(turn["with"]) for turn in turns]) - plain
    control = np.array([np.mean(turn["control"]) for turn in turns]) - plain
    return {
        "clock": CLOCK,
        "limit": "under 1% of an epoch",
        "device": epochs.device.type,
        "dataset": "synthetic",
        "config": config_to_dict(config),
        "rounds": rounds,
        "steps_per_epoch": epochs.steps,
        "saves_per_epoch": saves,
        "checkpoint_bytes": epochs.checkpoint_bytes,
        "warm_up": "one epoch of each side, dropped",
        "load_average_before": load_before,
        "epoch_seconds": float(np.median(plain)),
        "added_seconds_per_save": median_with_interval(list(added / saves)),
        "added_share": median_with_interval(list(added / plain)),
        "control_share": median_with_interval(list(control / plain)),
        "turn_seconds": turns,
    }


def _round(epochs: Epochs) -> dict[str, list[float]]:
    control, without, saving = [epochs.without()], [epochs.without()], [epochs.with_saves()]
    saving.append(epochs.with_saves())
    without.append(epochs.without())
    control.append(epochs.without())
    return {"without": without, "with": saving, "control": control}


def readable(result: dict[str, Any]) -> list[str]:
    """The result in a few lines."""
    seconds, low, high = result["added_seconds_per_save"]
    share, share_low, share_high = (100 * value for value in result["added_share"])
    aa, aa_low, aa_high = (100 * value for value in result["control_share"])
    size = result["checkpoint_bytes"] / 2**20
    return [
        f"epoch of {result['steps_per_epoch']} steps: {result['epoch_seconds']:.2f} s; "
        f"{result['saves_per_epoch']} save(s) of {size:.1f} MiB",
        f"a save adds  {seconds:.4f} s [{low:.4f}, {high:.4f}]",
        f"of the epoch {share:.2f}% [{share_low:.2f}, {share_high:.2f}]",
        f"A/A control  {aa:.2f}% [{aa_low:.2f}, {aa_high:.2f}]",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch (1)")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of four epochs and two (6)")
    parser.add_argument("--model", default="resnet18", help="network (resnet18)")
    parser.add_argument("--image-size", type=int, default=32, help="side in pixels (32)")
    parser.add_argument("--images", type=int, default=6400, help="images of an epoch (6400)")
    parser.add_argument("--batch-size", type=int, default=64, help="images of a step (64)")
    parser.add_argument("--save-every-n-steps", type=int, help="saves within the epoch too")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = TrainConfig(
        data="synthetic",
        model=options.model,
        img_size=options.image_size,
        num_classes=10,
        synthetic_train_images=options.images,
        synthetic_val_images=10,
        batch_size=options.batch_size,
        epochs=1,
        lr=0.001,
        scheduler="constant",
        ema_decay=0.999,
        precision="32",
        resident_data=True,
        compile=False,
        threads=options.threads,
        accelerator="gpu" if options.device == "cuda" else "cpu",
    )
    result = measure(config, rounds=options.rounds, every_n_steps=options.save_every_n_steps)
    device = f"cpu-{options.threads}-threads"
    if result["device"] == "cuda":
        device = "-".join(torch.cuda.get_device_name().lower().split())
    path = write_result("checkpoint-price", options.output, result, device=device)
    print("\n".join(readable(result)))
    print(path)


if __name__ == "__main__":
    main()
