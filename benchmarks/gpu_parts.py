"""The parts of gpu_suite.py, most telling first: what each of them runs, and what that proves.

Only Python's own library is used here: gpu_suite.py reads this before it has any packages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Options", "Part", "Task", "parts"]

ROOT = Path(__file__).parent.parent
BENCHMARKS = Path(__file__).parent
FRAMEWORK = ("-m", "training_framework")
# A network of seconds, to try every part on a CPU.
SMALL = {
    "model": "resnet10", "img_size": "8", "batch_size": "8", "synthetic_train_images": "32",
    "num_classes": "4", "threads": "1",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the parts are made for.

    Attributes:
        accelerator: `gpu`, or `cpu` to try the suite.
        small: Whether to use tiny networks and few samples, which prove that all parts work.
        cifar10: Folder with cifar-10-batches-py, as the tasks see it; empty if there is none.
        recipe: Configuration to train to 94% instead of the experiment cifar10-94; may be empty.
        lightning: Whether pytorch-lightning is installed on the machine.
    """

    accelerator: str = "gpu"
    small: bool = False
    cifar10: str = ""
    recipe: str = ""
    lightning: bool = False


@dataclass(frozen=True, kw_only=True)
class Task:
    """One process of a part.

    Attributes:
        name: Its name in the ledger; its output goes to `<name>.log`.
        proves: What its success, or its result, shows.
        command: Arguments of the Python interpreter.
        result: The file that it writes; empty if its output is the result.
        resume: Arguments that resume its unfinished result; empty: it starts again.
        minutes: Its limit, if the part has that much time left.
        missing: Why it cannot run here; empty if it can.
    """

    name: str
    proves: str
    command: tuple[str, ...]
    result: str = ""
    resume: tuple[str, ...] = ()
    minutes: float = 8.0
    missing: str = ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Tasks that fit together into nine minutes."""

    title: str
    tasks: tuple[Task, ...]


def parts(options: Options) -> tuple[Part, ...]:
    """All parts, in their order."""
    rows = [_step_speed(options, f"gpu-32px-{batch}") for batch in (128, 1024, 512, 256, 2048)]
    return (
        Part(title="it works", tasks=_works(options)),
        Part(
            title="speed of a step against a hand-written loop",
            tasks=(rows[0], _step_speed(options, "gpu-resnet50")),
        ),
        Part(title="the same with larger batches", tasks=tuple(rows[1:])),
        Part(title="time to 94% on CIFAR-10", tasks=(_to_94(options),)),
        Part(title="from one CPU thread to the GPU", tasks=_ladder(options)),
        Part(
            title="what each switch gains",
            tasks=(
                _comparison(
                    options,
                    "gpu-ablation",
                    "what each switch gains alone and among the others",
                    "--accelerator",
                    options.accelerator,
                ),
            ),
        ),
        Part(title="kinds of runs", tasks=_trainings(options)),
        Part(title="the framework's own cost, and other frameworks", tasks=_costs(options)),
    )


def _works(options: Options) -> tuple[Task, ...]:
    small = _flags(SMALL) if options.small else ()
    device = ("--accelerator", options.accelerator)
    large = () if options.small else ("--model", "resnet50", "--img-size", "224")
    common = ("--data", "synthetic", *device)
    settings = [f"{key}={value}" for key, value in SMALL.items()] if options.small else []
    return (
        Task(
            name="plan-resnet18",
            proves="what the plan chooses on this machine for ResNet-18 at 32 px, and why",
            command=(*FRAMEWORK, "plan", *common, "--img-size", "32", *small),
            minutes=2,  # it is the first to read PyTorch from the disk
        ),
        Task(
            name="plan-resnet50",
            proves="the same for ResNet-50 at 224 px",
            command=(*FRAMEWORK, "plan", *common, *large, "--batch-size", "256", *small),
            minutes=1,
        ),
        _training(options, "gpu-first-run", "a whole run works as planned", minutes=2),
        Task(
            name="cuda-tests",
            proves="the tests that need CUDA pass",
            command=(
                "-m", "pytest", *_cuda_test_files(), "-m", "cuda", "-q", "-W", "default",
                "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT),
                "-p", "no:cacheprovider", "--basetemp", "scratch/pytest",
                "--junitxml", "cuda-tests.xml",
            ),
            result="cuda-tests.xml",
            minutes=5,
        ),
        Task(
            name="host-waits",
            proves="the host never waits for the GPU inside a step",
            command=(
                str(BENCHMARKS / "host_waits.py"), "--output", "host-waits.json",
                "--settings", f"accelerator={options.accelerator}", *settings,
            ),
            result="host-waits.json",
            minutes=3,
        ),
    )  # fmt: skip


def _cuda_test_files() -> list[str]:
    """The test files with tests marked `cuda`; the others may import what is not there."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if "mark.cuda" in file.read_text(encoding="utf-8")]


def _step_speed(options: Options, row: str) -> Task:
    quick = ("--rounds", "2", "--rounds-per-process", "2", "--seconds", "0.05")
    usual = ("--rounds", "6", "--rounds-per-process", "6", "--seconds", "0.6")
    settings = [f"{key}={value}" for key, value in SMALL.items()] if options.small else []
    return _resumable(
        f"step-speed-{row}",
        "how many times as fast a step is as a hand-written loop's with the same settings",
        (
            str(BENCHMARKS / "step_speed.py"), row, *(quick if options.small else usual),
            "--settings", f"accelerator={options.accelerator}", *settings,
        ),
    )  # fmt: skip


def _resumable(name: str, proves: str, command: tuple[str, ...]) -> Task:
    """A script that resumes the file that it finds at --output."""
    whole = (*command, "--output", f"{name}.json")
    return Task(name=name, proves=proves, command=whole, result=f"{name}.json", resume=whole)


def _comparison(options: Options, experiment: str, proves: str, *flags: str) -> Task:
    """A shipped experiment of `compare`."""
    small: tuple[str, ...] = ()
    if options.small:
        kept = {key: value for key, value in SMALL.items() if key not in ("batch_size", "threads")}
        small = (*_flags(kept), "--rounds", "1", "--patience", "0", "--dropped-steps", "1")
        small += ("--seconds", "0.02")
    result = f"{experiment}.json"
    return Task(
        name=experiment,
        proves=proves,
        command=(*FRAMEWORK, "compare", experiment, "--output", result, *flags, *small),
        result=result,
        resume=(*FRAMEWORK, "compare", "--resume", result),
    )


def _to_94(options: Options) -> Task:
    name, device = "cifar10-94", ("--accelerator", options.accelerator)
    proves = "how many seconds of training lead to 94% on CIFAR-10"
    data: tuple[str, ...] = ()
    if options.small:
        data = ("--data", "synthetic", "--epochs", "1")
    missing = "" if options.cifar10 or options.small else "no data: give --cifar10 DIR"
    if options.cifar10 and not options.small:
        data = ("--data-root", options.cifar10)
    if not options.recipe:
        task = _comparison(options, name, proves, *data, *device)
        return Task(**{**vars(task), "missing": missing})
    small = _flags(SMALL) if options.small else ()
    flags = ("--config", options.recipe, *data, *device, *small)
    return _recorded(name, proves, flags, minutes=8, missing=missing)


def _ladder(options: Options) -> tuple[Task, ...]:
    device = ("--accelerator", options.accelerator)
    return (
        _comparison(
            options,
            "gpu-ladder",
            "the earlier projects' claims: one CPU thread against mixed precision on a GPU, "
            "mixed precision against fp32 there, and the MFU",
        ),
        _comparison(
            options, "gpu-batch-sweep", "which batch size is the fastest, and its memory", *device
        ),
    )


def _trainings(options: Options) -> tuple[Task, ...]:
    everything = (
        "--mixup", "0.2", "--cutmix", "1.0", "--cutout", "2", "--ema-decay", "0.99",
        "--grad-clip-val", "1.0", "--flip", "alternating", "--random-erasing", "0.2",
        "--accumulate-grad-batches", "2",
    )  # fmt: skip
    large = ("--model", "resnet50", "--img-size", "224", "--synthetic-train-images", "2048")
    works = "a run works with "
    compiled = () if options.small else ("--compile", "true")
    return (
        _training(options, "gpu-everything-on", works + "all methods", *everything, minutes=3),
        Task(
            name="gpu-resume",
            proves="a stopped and resumed run ends with the same weights, bit for bit",
            command=(
                str(BENCHMARKS / "resumed_run.py"), "--accelerator", options.accelerator,
                *(_flags(SMALL) if options.small else ("--batch-size", "256")),
            ),
            minutes=3,
        ),
        *(
            _training(
                options, f"gpu-{precision}", works + f"precision {precision}",
                "--precision", precision, minutes=2,
            )
            for precision in ("32", "bf16-mixed", *(["16-mixed"] if _on_gpu(options) else []))
        ),
        _training(options, "gpu-compiled", works + "torch.compile", *compiled, minutes=3),
        _training(
            options, "gpu-accumulated", works + "accumulated batches",
            "--accumulate-grad-batches", "4", minutes=2,
        ),
        _training(
            options, "gpu-memory-efficient", works + "the preset memory-efficient",
            "--config", "memory-efficient", *large, minutes=3,
        ),
    )  # fmt: skip


def _costs(options: Options) -> tuple[Task, ...]:
    device = "cuda" if _on_gpu(options) else "cpu"
    rounds = ("--rounds", "2", "--steps", "10", "--batch-size", "8") if options.small else ()
    small = _flags(SMALL) if options.small else ("--batch-size", "128")
    peers = [_step_speed(options, row) for row in ("lightning", "lightning-tiny")]
    missing = "" if options.lightning else "pytorch-lightning is not installed"
    return (
        Task(
            name="step-overhead",
            proves="what the framework adds to a bare loop, in microseconds a step",
            command=(
                str(BENCHMARKS / "step_overhead.py"), "--device", device, "--output", ".", *rounds,
            ),
            minutes=3,
        ),
        Task(
            name="profile",
            proves="where the time of a step goes, and which operator takes the most",
            command=(
                *FRAMEWORK, "profile", "--data", "synthetic", "--img-size", "32",
                "--accelerator", options.accelerator, "--name", "profile", "--tensorboard", "false",
                "--output-dir", ".", "--steps", "3" if options.small else "20",
                *small,
            ),
            minutes=3,
        ),
        *(Task(**{**vars(peer), "missing": missing}) for peer in peers),
    )  # fmt: skip


def _training(options: Options, name: str, proves: str, *flags: str, minutes: float) -> Task:
    """A recorded run on made-up images."""
    size = _flags(SMALL) if options.small else ("--batch-size", "256")
    common = (
        "--data", "synthetic", "--num-classes", "10", "--seed", "0", "--img-size", "32",
        "--synthetic-train-images", "16384", "--epochs", "2", "--tensorboard", "false",
    )  # fmt: skip
    device = ("--accelerator", options.accelerator)
    return _recorded(name, proves, (*common, *device, *flags, *size), minutes=minutes)


def _recorded(
    name: str, proves: str, flags: Sequence[str], *, minutes: float, missing: str = ""
) -> Task:
    result = f"{name}.json"
    script = str(BENCHMARKS / "record_run.py")
    return Task(
        name=name, proves=proves, result=result, minutes=minutes, missing=missing,
        command=(script, name, "--output", result, "--", *flags),
    )  # fmt: skip


def _flags(settings: dict[str, str]) -> tuple[str, ...]:
    pairs = ((f"--{key.replace('_', '-')}", value) for key, value in settings.items())
    return tuple(text for pair in pairs for text in pair)


def _on_gpu(options: Options) -> bool:
    return options.accelerator != "cpu"
