"""What the guarantees cost: whole epochs, as `train` runs them, against bare optimizer steps.

    python benchmarks/reliability_price.py              # an epoch as long as CIFAR-10's
    python benchmarks/reliability_price.py --short      # four epochs an eighth as long

Two variants take turns in the engine of `compare`. They run in one process, with the same network,
data and optimizer in memory, so that only the loop differs:

- bare: only the optimizer steps of an epoch;
- all of it: Trainer.fit() over the same epoch. It listens for signals, checks losses, gradients and
  weights for NaN, and makes a digest of the samples, rows of metrics.csv, and a checkpoint at the
  end of each epoch. The clock stops when the last checkpoint is flushed to the disk.

The ratio says what share of its speed an epoch keeps. The result file has the format of `compare`.
The seconds that an epoch loses hardly depend on its length, so short epochs measure them more
exactly. Several follow one another, since in a run a checkpoint is written during the next epoch.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_overhead import median_with_interval

from training_framework.checkpoint import CheckpointKeeper
from training_framework.config import TrainConfig
from training_framework.config.loading import config_to_dict
from training_framework.loggers import CsvLogger, LoggerGroup
from training_framework.machine.load import MachineWatch
from training_framework.machine.memory import peak_memory
from training_framework.measure.compare.comparison import Comparison
from training_framework.measure.compare.environment import device_label
from training_framework.measure.compare.experiment import CONTROL, Experiment, Variant
from training_framework.measure.compare.result import (
    Measurement,
    Result,
    result_file_name,
    save_result,
    unused_path,
)
from training_framework.measure.compare.timing import StepSampler
from training_framework.measure.profile.run_parts import synchronize
from training_framework.runs.progress import Progress
from training_framework.training.outputs import Outputs
from training_framework.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
LIMIT = 0.01
EPOCH, SHORT_EPOCH = 49920, 6400
SHORT_EPOCHS = 4
BARE, ALL = "bare", "all of it"
CLOCK = (
    "epochs of optimizer steps: waiting for data, its copy and augmentation, forward, backward, "
    f"update; {ALL!r} with watching, logging and checkpoints until they are on the disk"
)


class BareWorker:
    """Runs only the steps."""

    def __init__(self, sampler: StepSampler) -> None:
        self._sampler = sampler
        self.facts = sampler.facts

    def sample(self, round_number: int) -> Measurement:
        """Time the steps of a run."""
        return self._sampler.sample(round_number)

    def close(self) -> None:
        """No-op: whoever made the sampler closes it."""


class GuardedWorker(BareWorker):
    """Makes the same steps as part of a whole run.

    Args:
        sampler: Provides network, data and optimizer.
        config: What it was made from.
        folder: Where to write checkpoints.
    """

    def __init__(self, sampler: StepSampler, config: TrainConfig, folder: Path) -> None:
        super().__init__(sampler)
        self._config = config
        self._folder = folder
        self._watch = MachineWatch()

    def sample(self, round_number: int) -> Measurement:
        """Time a new run."""
        device, plan = self._sampler.device, self._sampler.plan
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=self._folder))
            loggers = stack.enter_context(LoggerGroup([CsvLogger(Path(folder) / "metrics.csv")]))
            keeper = CheckpointKeeper(
                Path(folder),
                prefix=self._config.model,
                keep=self._config.save_top_k,
                every_n_steps=self._config.save_every_n_steps,
                every_seconds=self._config.save_every_seconds,
            )
            trainer = self._trainer(keeper, loggers)
            synchronize(device)
            self._watch.start()
            start = time.perf_counter()
            trainer.fit()
            keeper.close()
            synchronize(device)
            seconds = time.perf_counter() - start
            load = self._watch.stop()
        return Measurement(
            round=round_number,
            seconds=seconds,
            steps=plan.total_steps,
            images=plan.total_steps * plan.images_per_step,
            cpu_seconds=load.cpu_seconds,
            other_cpu_share=load.other_cpu_share,
            peak_memory_bytes=peak_memory(device),
        )

    def _trainer(self, keeper: CheckpointKeeper, loggers: LoggerGroup) -> Trainer:
        sampler = self._sampler
        return Trainer(
            plan=sampler.plan,
            parts=sampler.parts,
            outputs=Outputs(
                loggers=loggers,
                checkpoints=keeper,
                checkpoint_extras={"config": config_to_dict(self._config), "network": {}},
            ),
            progress=Progress(),
        )


def measure(experiment: Experiment, *, path: Path, command: str) -> Result:
    """Run the comparison; its file is written after every round."""
    config = experiment.config_of(experiment.baseline_variant)
    steps = int(config.epochs) * (config.synthetic_train_images // config.batch_size)
    sampler: StepSampler | None = None

    with tempfile.TemporaryDirectory(prefix="reliability-price-") as folder:

        def open_worker(variant: Variant, _: TrainConfig, order: Mapping[str, Any]) -> BareWorker:
            nonlocal sampler
            if sampler is None:
                sampler = StepSampler(
                    config, steps=steps, seconds=1.0, warmup_steps=order["warmup_steps"]
                )
                sampler.parts.loaders.val = None  # evaluations are not measured here
            if variant.name == ALL:
                return GuardedWorker(sampler, config, Path(folder))
            return BareWorker(sampler)

        result = Comparison(experiment, path=path, command=command, open_worker=open_worker).run()
        if sampler is not None:
            sampler.close()
    result = result.model_copy(update={"clock": CLOCK})
    save_result(result, path)
    return result


def readable(result: Result) -> list[str]:
    """What the guarantees cost an epoch, in a few lines."""
    lines = []
    for name, label in ((ALL, "of an epoch they take"), (CONTROL, "A/A control")):
        ratio = result.ratio_of(name)
        if ratio is not None and ratio.low is not None and ratio.high is not None:
            # The ratio is of speeds: the share of speed lost is the share of the epoch they take.
            share, low, high = (
                100 * (1 - value) for value in (ratio.median, ratio.high, ratio.low)
            )
            lines.append(f"{label:22s} {share:.2f}% [{low:.2f}, {high:.2f}]")
    seconds = {
        variant.name: np.array([measurement.seconds for measurement in variant.measurements])
        for variant in result.variants
    }
    epochs = result.variants[0].config["epochs"]
    added, low, high = median_with_interval(list((seconds[ALL] - seconds[BARE]) / epochs))
    lines.append(f"{'seconds of an epoch':22s} {added:.3f} [{low:.3f}, {high:.3f}]")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--rounds", type=int, default=8, help="turns of each side (8)")
    parser.add_argument("--model", default="resnet18", help="network (resnet18)")
    parser.add_argument("--stem", default="imagenet", choices=["cifar", "imagenet"])
    parser.add_argument("--image-size", type=int, default=32, help="side in pixels (32)")
    parser.add_argument("--short", action="store_true", help="four short epochs a sample")
    parser.add_argument("--images", type=int, help=f"of an epoch ({EPOCH})")
    parser.add_argument("--batch-size", type=int, default=128, help="images of a step (128)")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch (as planned)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="result file (JSON)")
    options = parser.parse_args()
    images = options.images or (SHORT_EPOCH if options.short else EPOCH)
    experiment = Experiment(
        name="reliability-price" + "-short" * options.short,
        description="What checkpoints, watching for NaN, digests and logs take of an epoch.",
        base={
            "data": "synthetic",
            "model": options.model,
            "stem": options.stem,
            "img_size": options.image_size,
            "num_classes": 10,
            "synthetic_train_images": images // options.batch_size * options.batch_size,
            "synthetic_val_images": 10,
            "batch_size": options.batch_size,
            "epochs": SHORT_EPOCHS if options.short else 1,
            "lr": 0.001,
            "scheduler": "constant",
            "ema_decay": 0.999,
            "resident_data": True,
            "accelerator": options.accelerator,
            "threads": options.threads or "auto",
        },
        variants=(Variant(name=BARE), Variant(name=ALL)),
        rounds=options.rounds,
        isolation="shared",
        patience=0.3,  # a sample is long: repeating it would cost more than the noise does
    )
    name = result_file_name(experiment.name, device_label(experiment), torch.__version__)
    path = options.output or unused_path(RESULTS / name)
    command = " ".join(["python", "benchmarks/reliability_price.py", *sys.argv[1:]])
    result = measure(experiment, path=path, command=command)
    print("\n".join([*readable(result), str(path)]))
    ratio = result.ratio_of(ALL)
    return 0 if ratio is not None and ratio.low is not None and 1 - ratio.low < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
