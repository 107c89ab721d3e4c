"""The result file of a comparison: its schema, written and read. docs/results.md describes it."""

import datetime
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training_framework.errors import UserError
from training_framework.runs.directory import write_text_atomically

__all__ = [
    "SCHEMA_VERSION",
    "Measurement",
    "Ratio",
    "Result",
    "VariantFacts",
    "VariantResult",
    "load_result",
    "result_file_name",
    "save_result",
    "unused_path",
]

SCHEMA_VERSION = 1


class _Record(BaseModel):
    # JSON has no NaN, so unknown values are null.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class VariantFacts(_Record):
    """What a variant is after it was built, and how it warmed up.

    Attributes:
        device: PyTorch's device type.
        device_name: The processor's or accelerator's own name.
        dataset: Name of the data set; `synthetic` is made up, all others are real.
        train_images: Images of its training split.
        image_size: Side in pixels.
        images_per_step: Images of one optimizer step, as planned.
        flops_per_image: Training FLOPs of one image.
        peak_flops: Peak FLOP/s of the device in the dtype used; 0 if unknown.
        peak_flops_source: `measured`, `cited` or `n/a`.
        plan: Every planned number and choice.
        build_seconds: Time for opening the data and building network, optimizer and loaders, not
            counting the start of Python and the import of PyTorch.
        warmup_step_seconds: Wall seconds of each dropped step of the first warm-up.
    """

    device: str
    device_name: str
    dataset: str
    train_images: int
    image_size: int
    images_per_step: int
    flops_per_image: float
    peak_flops: float
    peak_flops_source: str
    plan: dict[str, Any]
    build_seconds: float
    warmup_step_seconds: list[float]


class Measurement(_Record):
    """One sample, raw.

    Attributes:
        round: Counted from 0; samples of the same round form pairs.
        process: The start of the variants' processes that it belongs to, counted from 0.
        seconds: Wall seconds of the timed window; the device is synchronized before both readings.
        steps: Optimizer steps in it.
        images: Training images in it.
        step_seconds: Seconds of each step; empty where whole runs are timed.
        dropped_step_seconds: Seconds of the steps made just before the window, to warm up again.
        cpu_seconds: CPU time of this variant's processes in the window.
        other_cpu_share: Share of the machine's usable cores that all other processes took.
        peak_memory_bytes: On a CUDA device, the most that PyTorch had allocated; else the highest
            resident set of the variant's process so far.
        probe_seconds: On a CPU, seconds of a fixed task on all cores, just before and just after:
            only this shows what others outside a virtual machine take of its cores.
        retakes: Earlier samples that were dropped because the machine was not quiet around them.
        new_graphs: Graphs that torch.compile made within the window.
        seed: Seed of the run; None where steps are timed.
        acc1: Top-1 accuracy in percent at the end of a run.
        curve: Seconds since the start of training and top-1 accuracy after each epoch.
        epoch_seconds: Wall seconds of each epoch of a run.
    """

    round: int
    process: int = 0
    seconds: float
    steps: int
    images: int
    step_seconds: list[float] = []
    dropped_step_seconds: list[float] = []
    cpu_seconds: float
    other_cpu_share: float
    peak_memory_bytes: int
    probe_seconds: tuple[float, float] | None = None
    retakes: int = 0
    new_graphs: int = 0
    seed: int | None = None
    acc1: float | None = None
    curve: list[tuple[float, float]] = []
    epoch_seconds: list[float] = []


class VariantResult(_Record):
    """One variant: what it was, its samples, and what the validity gate says of them.

    Attributes:
        overrides: Settings that differ from the base.
        environment: Environment variables of its process.
        against: The variant that this one is compared with; empty for the baseline itself.
        control: Whether it is the A/A control.
        unit: Unit of the samples: `images/s`, `s/epoch`, `s` or `s to 90.0%`.
        samples: One value for each finished round; None if a run missed the target accuracy.
        median: Median of the samples; None if there are none.
        spread: Interquartile range of the samples divided by their median.
        marks: Names of what the validity gate found: see `measure.compare.validity`.
        details: The reason for each mark, for people.
        unavailable: Why there are no (more) samples; empty if none are missing.
        images_per_second, peak_memory_bytes, cpu_cores, acc1: Medians over the samples (cpu_cores:
            CPU seconds in a second).
        mfu: Model FLOPs utilization at the median speed; None where the peak is unknown.
        peak_flops: The denominator of `mfu` in FLOP/s: the highest peak measured by any variant
            with the same device, threads and precision, or the data sheet's.
        startup_seconds: Time for building, plus what the warm-up took longer than as many settled
            steps.
        repays_after_steps: Steps after which a longer start has paid for itself, compared with
            `against`; None if it never does or the start is no longer.
        config: The resolved configuration.
        facts: None if the variant could not be built.
        measurements: The raw samples.
    """

    name: str
    overrides: dict[str, Any]
    environment: dict[str, str] = {}
    against: str = ""
    control: bool = False
    unit: str
    samples: list[float | None] = []
    median: float | None = None
    spread: float | None = None
    marks: list[str] = []
    details: list[str] = []
    unavailable: str = ""
    images_per_second: float | None = None
    peak_memory_bytes: int | None = None
    cpu_cores: float | None = None
    acc1: float | None = None
    mfu: float | None = None
    peak_flops: float | None = None
    startup_seconds: float | None = None
    repays_after_steps: int | None = None
    config: dict[str, Any]
    facts: VariantFacts | None = None
    measurements: list[Measurement] = []


class Ratio(_Record):
    """How many times as fast `variant` is as `against`: above 1 is faster, whatever the unit.

    Attributes:
        median: Median of the paired ratios.
        low, high: Ends of the 95% interval; None with a single pair.
        pairs: Number of pairs: pairs of processes, each represented by the median of its rounds, or
            pairs of rounds if the variants started only once.
        control: Whether it is the A/A control, whose ratio should be 1.
    """

    variant: str
    against: str
    median: float
    low: float | None
    high: float | None
    pairs: int
    control: bool = False


class Result(_Record):
    """A whole comparison.

    Attributes:
        schema_version: Version of this layout; raised when a reader of the old one would fail.
        experiment: Name.
        definition: The experiment as it was run, enough to resume it.
        command: The command that repeats it.
        started: UTC, ISO 8601.
        commit: Commit of the framework's sources, with `-dirty` if they were changed; None if
            unknown.
        environment: Machine, versions and the environment variables that matter.
        clock: What the samples' time includes.
        complete: Whether all rounds are finished.
        marks: What the validity gate says about the comparison as a whole.
        target_accuracy: Top-1 accuracy in percent at which the clock stops.
    """

    schema_version: Literal[1] = 1
    experiment: str
    description: str = ""
    definition: dict[str, Any]
    command: str
    started: str
    commit: str | None = None
    environment: dict[str, Any]
    clock: str
    complete: bool
    rounds: int = Field(description="Finished rounds.")
    marks: list[str] = []
    details: list[str] = []
    target_accuracy: float | None = None
    variants: list[VariantResult]
    ratios: list[Ratio] = []

    def ratio_of(self, variant: str) -> Ratio | None:
        """The variant's ratio; None for the baseline and for a variant without samples."""
        return next((ratio for ratio in self.ratios if ratio.variant == variant), None)


def save_result(result: BaseModel, path: Path) -> None:
    """Write a result file of `compare` or `tune`; the old one stays until the new one is complete.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, result.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written to ({error.strerror})", "give another --output"
        ) from None


def load_result(path: Path) -> Result:
    """Read a result file.

    Raises:
        UserError: It is missing, or not a result file of this version.
    """
    try:
        return Result.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror})", "name a result file"
        ) from None
    except (ValidationError, UnicodeDecodeError) as error:
        reason = "not UTF-8 text"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"
        raise UserError(
            f"{path}: not a result file of schema version {SCHEMA_VERSION} ({reason})",
            "name a file that `compare` wrote",
        ) from None


def result_file_name(experiment: str, device: str, torch_version: str) -> str:
    """`<experiment>_<device>_<torch>_<date>.json`, of lower-case letters, digits, `.` and `-`."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parts = (experiment, device, torch_version.partition("+")[0], today)
    plain = (re.sub(r"[^a-z0-9.]+", "-", part.lower()).strip("-") for part in parts)
    return "_".join(plain) + ".json"


def unused_path(path: Path) -> Path:
    """The path itself or, if it is taken, with `-2`, `-3`, ... before its suffix."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate
