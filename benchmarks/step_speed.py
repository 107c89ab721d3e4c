"""The framework's step against hand-written loops, in turns on this machine.

    python benchmarks/step_speed.py cifar-stem          # ResNet-18, 32 px, batch 64
    python benchmarks/step_speed.py imagenet-stem       # ResNet-18, ImageNet stem, 32 px, batch 128
    python benchmarks/step_speed.py resnet50            # ResNet-50, 224 px, batch 8
    python benchmarks/step_speed.py memory              # the preset memory-efficient, as cifar-stem

B0 and B1 are the loops of reference_loops.py. All sides train on the same made-up images, each in
processes of its own; the engine of `compare` gives them turns, intervals, a control and marks. The
result goes to benchmarks/results/step-speed-<row>_….json.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from reference_loops import B0, B1

from training_framework.benchmark import workers
from training_framework.benchmark.circumstances import device_label
from training_framework.benchmark.comparison import Comparison
from training_framework.benchmark.experiment import CONTROL, Experiment, Variant
from training_framework.benchmark.machine_load import MachineWatch, peak_memory
from training_framework.benchmark.result import (
    Measurement,
    VariantFacts,
    result_file_name,
    unused_path,
)
from training_framework.benchmark.table import result_lines
from training_framework.benchmark.timing import STEPS_TO_WARM_UP_AGAIN
from training_framework.benchmark.worker import main as answer_requests
from training_framework.config import TrainConfig
from training_framework.config.inheritance import read_config_file
from training_framework.data import open_dataset
from training_framework.flops import training_flops_per_image
from training_framework.hardware import detect_hardware
from training_framework.peak_flops import measure_peak_flops
from training_framework.plan import make_plan

RESULTS = Path(__file__).parent / "results"
CIFAR = {"data": "synthetic", "synthetic_train_images": 4096, "img_size": 32}
ROWS: dict[str, dict[str, Any]] = {
    "cifar-stem": {**CIFAR, "model": "resnet18", "stem": "cifar", "batch_size": 64},
    "imagenet-stem": {**CIFAR, "model": "resnet18", "stem": "imagenet", "batch_size": 128},
    "resnet50": {
        "data": "synthetic", "synthetic_train_images": 128, "img_size": 224, "num_classes": 1000,
        "model": "resnet50", "stem": "imagenet", "batch_size": 8,
    },
}  # fmt: skip
# In parts of so many images, the preset's, the same images make a step.
ROWS["memory"] = ROWS["cifar-stem"]
MEMORY_EFFICIENT = {
    key: setting.value for key, setting in read_config_file("memory-efficient").items()
}
REFERENCES = ("B0", "B1", "B1 in fp32")
BASELINE = "B0"


class LoopSampler:
    """Times a reference loop as `StepSampler` times the framework."""

    def __init__(self, name: str, config: TrainConfig, order: Mapping[str, Any]) -> None:
        started = time.perf_counter()
        dataset = open_dataset(
            "synthetic",
            image_size=config.img_size,
            num_classes=config.num_classes,
            synthetic_train_images=config.synthetic_train_images,
            synthetic_val_images=1,
        )
        plan = make_plan(config, detect_hardware(), dataset.facts)
        torch.set_num_threads(plan.threads)
        self._device = plan.torch_device(0)
        arrays = dataset.train.materialize("cpu")  # type: ignore[union-attr]
        loop = B0 if name == "B0" else B1
        extra = {} if name == "B0" else {"bf16": name == "B1"}
        self._loop = loop(
            config.model, plan.stem, dataset.facts.num_classes, arrays.images, arrays.labels,
            batch_size=config.batch_size, device=self._device, **extra,
        )  # fmt: skip
        self._watch = MachineWatch()
        build_seconds = time.perf_counter() - started
        warmup = self._timed(order["warmup_steps"])[0]
        self._steps = order["steps"] or max(3, round(order["seconds"] / min(warmup)))
        dtype = torch.bfloat16 if name == "B1" else torch.float32
        peak, source = order["peak"] or measure_peak_flops(plan.device, plan.device_name, dtype)
        precision = "bf16-mixed" if name == "B1" else "32"
        self.facts = VariantFacts(
            device=plan.device,
            device_name=plan.device_name,
            dataset="synthetic",
            train_images=len(arrays),
            image_size=plan.image_size,
            images_per_step=config.batch_size,
            flops_per_image=training_flops_per_image(self._loop.model, plan.image_size),
            peak_flops=peak,
            peak_flops_source=source,
            plan={**plan.as_dict(), "precision": precision, "compile": False},
            build_seconds=build_seconds,
            warmup_step_seconds=warmup,
        )

    def sample(self, round_number: int) -> Measurement:
        dropped = self._timed(STEPS_TO_WARM_UP_AGAIN)[0]
        self._watch.start()
        started = time.perf_counter()
        steps, images = self._timed(self._steps)
        seconds = time.perf_counter() - started
        load = self._watch.stop()
        return Measurement(
            round=round_number,
            seconds=seconds,
            steps=self._steps,
            images=images,
            step_seconds=steps,
            dropped_step_seconds=dropped,
            cpu_seconds=load.cpu_seconds,
            other_cpu_share=load.other_cpu_share,
            peak_memory_bytes=peak_memory(self._device),
        )

    def close(self) -> None:
        """Nothing stays open."""

    def _timed(self, steps: int) -> tuple[list[float], int]:
        seconds, images = [], 0
        for _ in range(steps):
            start = time.perf_counter()
            images += self._loop.step()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            seconds.append(time.perf_counter() - start)
        return seconds, images


def open_worker(
    variant: Variant, config: TrainConfig, order: Mapping[str, Any]
) -> workers.ProcessWorker:
    name = BASELINE if variant.name == CONTROL else variant.name
    loop = ["--loop", name] if name in REFERENCES else []
    return workers.ProcessWorker(
        config, order, environment={}, program=[__file__, "--worker", *loop]
    )


def experiment(row: str, **changes: Any) -> Experiment:
    ours = Variant(name="ours")
    if row == "memory":
        ours = Variant(name="memory-efficient", overrides=MEMORY_EFFICIENT)
    variants = (*(Variant(name=name) for name in REFERENCES), ours)
    return Experiment(
        name=f"step-speed-{row}",
        description="The framework as planned against hand-written loops.",
        base=ROWS[row],
        variants=variants,
        baseline=BASELINE,
        **changes,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", nargs="?", choices=ROWS)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a sample")
    parser.add_argument(
        "--rounds-per-process", type=int, help="start all anew after so many rounds (a sixth)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="result file (JSON)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--loop", choices=REFERENCES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        if options.loop is not None:
            workers.open_sampler = lambda config, order: LoopSampler(options.loop, config, order)
        answer_requests()
        return 0
    if options.row is None:
        parser.error("name a row")
    chosen = experiment(
        options.row,
        rounds=options.rounds,
        seconds=options.seconds,
        rounds_per_process=options.rounds_per_process,
    )
    name = result_file_name(chosen.name, device_label(chosen), torch.__version__)
    result = Comparison(
        chosen,
        path=options.output or unused_path(RESULTS / name),
        command=shlex.join(["python", "benchmarks/step_speed.py", *sys.argv[1:]]),
        open_worker=open_worker,
    ).run()
    print("\n".join(result_lines(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
