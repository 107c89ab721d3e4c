"""Compares the framework's step with hand-written loops, in turns, on this machine.

    python benchmarks/step_speed.py cifar-stem          # ResNet-18, 32 px, batch 64
    python benchmarks/step_speed.py imagenet-stem       # ResNet-18, ImageNet stem, 32 px, batch 128
    python benchmarks/step_speed.py resnet50            # ResNet-50, 224 px, batch 8
    python benchmarks/step_speed.py memory              # as cifar-stem, the preset memory-efficient
    python benchmarks/step_speed.py gpu-32px-128        # on a GPU: ResNet-18, 32 px, batch 128;
                                                        # also 256, 512, 1024 and 2048
    python benchmarks/step_speed.py gpu-resnet50        # on a GPU: ResNet-50, 224 px, batch 256
    python benchmarks/step_speed.py lightning           # Lightning's Trainer, as cifar-stem
    python benchmarks/step_speed.py lightning-tiny      # ResNet-10, 8 px, batch 8: the loop shows

B0 and B1 are the loops of reference_loops.py; Lightning's is in peer_loops.py. All train on the
same made-up images, each in its own processes, timed by the same clock. The engine of `compare`
provides turns, intervals, a control and marks. The result goes to
benchmarks/results/step-speed-<row>_….json, or to --output, where an unfinished one is resumed.
"""

import argparse
import functools
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peer_loops import LightningLoop
from reference_loops import B0, B1

from training_framework.config import TrainConfig
from training_framework.config.inheritance import parse_yaml, read_config_file
from training_framework.data import open_dataset
from training_framework.machine.hardware import detect_hardware
from training_framework.machine.load import MachineWatch
from training_framework.machine.memory import peak_memory
from training_framework.machine.peak_flops import measure_peak_flops
from training_framework.machine.precision import Precision, product_format
from training_framework.measure.compare import workers
from training_framework.measure.compare.comparison import Comparison, OpenWorker
from training_framework.measure.compare.environment import device_label
from training_framework.measure.compare.experiment import CONTROL, Experiment, Variant
from training_framework.measure.compare.result import (
    Measurement,
    VariantFacts,
    result_file_name,
    unused_path,
)
from training_framework.measure.compare.step_times import time_steps
from training_framework.measure.compare.table import result_lines
from training_framework.measure.compare.timing import STEPS_TO_WARM_UP_AGAIN
from training_framework.measure.compare.worker import main as answer_requests
from training_framework.models.flops import training_flops_per_image
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
# A step has as many images as in cifar-stem, in parts of the preset's size.
ROWS["memory"] = ROWS["cifar-stem"]
MEMORY_EFFICIENT = {
    key: setting.value for key, setting in read_config_file("memory-efficient").items()
}
ROWS["lightning"] = ROWS["cifar-stem"]
ROWS["lightning-tiny"] = {
    "data": "synthetic", "synthetic_train_images": 1024, "img_size": 8,
    "model": "resnet10", "stem": "imagenet", "batch_size": 8,
}  # fmt: skip
CIFAR_ON_GPU = {
    **CIFAR, "synthetic_train_images": 16384, "model": "resnet18", "stem": "cifar",
    "accelerator": "gpu",
}  # fmt: skip
GPU_BATCHES = (128, 256, 512, 1024, 2048)
ROWS |= {f"gpu-32px-{batch}": {**CIFAR_ON_GPU, "batch_size": batch} for batch in GPU_BATCHES}
ROWS["gpu-resnet50"] = {
    **ROWS["resnet50"], "synthetic_train_images": 1024, "batch_size": 256, "accelerator": "gpu",
}  # fmt: skip
EAGER = {"compile": False, "cuda_graph": False}
RECORDED = {"precision": "bf16-mixed", "compile": False, "cuda_graph": True}
ON_GPU = (
    Variant(name="as planned"),
    Variant(name="recorded", needs=("gpu",), overrides=RECORDED),
    Variant(
        name="compiled and recorded", needs=("gpu",),
        overrides={**RECORDED, "compile": True, "compile_mode": "default"},
    ),
)  # fmt: skip
# With the peer's operators, only the loop differs.
SAME_KERNELS = {
    "precision": "32",
    "channels_last": True,
    **EAGER,
    "small_map_convolutions": False,
    "winograd_convolutions": False,
    "fused_norms": False,
    "keep_memory": False,
}
LIGHTNING = "Lightning"
REFERENCES = ("B0", "B1", "B1 in fp32")
LOOPS = (*REFERENCES, LIGHTNING)


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
        arrays = dataset.train.array("cpu")
        self._batch_size = config.batch_size
        self._loop = _loop_class(name)(
            config.model, plan.stem, dataset.facts.num_classes, arrays.images, arrays.labels,
            batch_size=config.batch_size, device=self._device,
        )  # fmt: skip
        self._watch = MachineWatch()
        build_seconds = time.perf_counter() - started
        warmup = self._timed(order["warmup_steps"])[0]
        self._steps = order["steps"] or max(3, round(order["seconds"] / min(warmup)))
        precision: Precision = "bf16-mixed" if name == "B1" else "32"
        # On a GPU with TF32, PyTorch's own setting uses it for convolutions, and so does the plan.
        factors = product_format(precision, plan.fp32_precision)
        peak, source = order["peak"] or measure_peak_flops(plan.device, plan.device_name, factors)
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
            plan={**plan.as_dict(), "precision": precision, **EAGER},
            build_seconds=build_seconds,
            warmup_step_seconds=warmup,
        )

    def sample(self, round_number: int) -> Measurement:
        dropped = self._timed(STEPS_TO_WARM_UP_AGAIN)[0]
        on_cuda = self._device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._watch.start()
        steps, images = self._timed(self._steps)
        load = self._watch.stop()
        memory = peak_memory(self._device)
        if on_cuda:
            torch.cuda.empty_cache()  # the others need the memory during their turns
        return Measurement(
            round=round_number,
            seconds=sum(steps),  # a peer's start is not part of a step
            steps=self._steps,
            images=images,
            step_seconds=steps,
            dropped_step_seconds=dropped,
            cpu_seconds=load.cpu_seconds,
            other_cpu_share=load.other_cpu_share,
            peak_memory_bytes=memory,
        )

    def close(self) -> None:
        """Nothing stays open."""

    def _timed(self, steps: int) -> tuple[list[float], int]:
        if isinstance(self._loop, LightningLoop):
            return self._loop.timed_steps(steps), steps * self._batch_size
        return time_steps(self._loop.step, steps, self._device)


def _loop_class(name: str) -> Callable[..., B0 | B1 | LightningLoop]:
    if name == LIGHTNING:
        return LightningLoop
    return B0 if name == "B0" else functools.partial(B1, bf16=name == "B1")


def opener(baseline: str) -> OpenWorker:
    """Starts a process that runs a variant's loop, or the framework."""

    def open_worker(
        variant: Variant, config: TrainConfig, order: Mapping[str, Any]
    ) -> workers.ProcessWorker:
        name = baseline if variant.name == CONTROL else variant.name
        loop = ["--loop", name] if name in LOOPS else []
        return workers.ProcessWorker(
            config, order, environment={}, program=[__file__, "--worker", *loop]
        )

    return open_worker


def experiment(row: str, settings: Mapping[str, Any] | None = None, **changes: Any) -> Experiment:
    """The experiment of a row.

    Args:
        row: One of `ROWS`.
        settings: Settings that override the row's.
        **changes: Fields of the experiment.
    """
    ours: tuple[Variant, ...] = (Variant(name="ours"),)
    references: tuple[str, ...] = REFERENCES
    if row == "memory":
        ours = (Variant(name="memory-efficient", overrides=MEMORY_EFFICIENT),)
    elif row.startswith("lightning"):
        ours = (Variant(name="ours, the same kernels", overrides=SAME_KERNELS), *ours)
        references = (LIGHTNING,)
    elif row.startswith("gpu"):
        ours, references = ON_GPU, ("B1",)
    return Experiment(
        name=f"step-speed-{row}",
        description="The framework as planned against "
        + ("a peer's training loop." if LIGHTNING in references else "hand-written loops."),
        base={**ROWS[row], **(settings or {})},
        variants=(*(Variant(name=name) for name in references), *ours),
        baseline=references[0],
        **changes,
    )


def settings_of(texts: Sequence[str]) -> dict[str, Any]:
    """`batch_size=8` and the like as settings by key, typed as YAML would."""
    return {key: parse_yaml(value) for key, _, value in (text.partition("=") for text in texts)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", nargs="?", choices=ROWS)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a sample")
    parser.add_argument(
        "--rounds-per-process", type=int, help="start all anew after so many rounds (a sixth)"
    )
    parser.add_argument(
        "--settings", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all sides"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="result file (JSON); resumed if it exists"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--loop", choices=LOOPS, help=argparse.SUPPRESS)
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
        settings_of(options.settings),
        rounds=options.rounds,
        seconds=options.seconds,
        rounds_per_process=options.rounds_per_process,
    )
    open_worker = opener(chosen.baseline_variant.name)
    if options.output is not None and options.output.exists():
        comparison = Comparison.resume(options.output, open_worker=open_worker)
    else:
        name = result_file_name(chosen.name, device_label(chosen), torch.__version__)
        comparison = Comparison(
            chosen,
            path=options.output or unused_path(RESULTS / name),
            command=shlex.join(["python", "benchmarks/step_speed.py", *sys.argv[1:]]),
            open_worker=open_worker,
        )
    result = comparison.run()
    print("\n".join(result_lines(result)))
    return int(bool(comparison.stopped_by))


if __name__ == "__main__":
    sys.exit(main())
