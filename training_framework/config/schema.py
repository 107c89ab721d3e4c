"""The configuration: flat, typed, frozen and validated."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from training_framework.config.architectures import MODELS
from training_framework.config.data_sets import DATA_SETS
from training_framework.schedules import SCHEDULES

__all__ = ["TRAJECTORY_FREE_KEYS", "OptimizerName", "Section", "TrainConfig", "sections"]

Section = Literal["data", "model", "training", "machine", "run"]

Auto = Literal["auto"]
MAX_COUNT = 2**53  # largest integer up to which a float counts exactly; far above any real count
PositiveInt = Annotated[int, Field(ge=1, le=MAX_COUNT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _plain_precision(value: Any) -> Any:
    # YAML reads `precision: 32` as a number, and other trainers write 32-true.
    return "32" if value in (32, "32-true") and not isinstance(value, bool) else value


Precision = Annotated[
    Literal["auto", "32", "mixed", "bf16-mixed", "16-mixed"], BeforeValidator(_plain_precision)
]
OptimizerName = Literal["sgd", "adam", "adamw"]
if TYPE_CHECKING:
    DataSetName: TypeAlias = str
    ModelName: TypeAlias = str
    ScheduleName: TypeAlias = str
else:
    DataSetName, ModelName = Literal[tuple(DATA_SETS)], Literal[tuple(MODELS)]
    ScheduleName = Literal[tuple(SCHEDULES)]
# A file name or path arrives as text from YAML and from flags.
FilePath = Annotated[Path, Field(strict=False)]
Resume = Annotated[Literal["auto", "never"] | FilePath, Field(union_mode="left_to_right")]


def _one_of(names: Iterable[str]) -> str:
    """The names as a sentence lists them: `a, b or c`."""
    *first, last = names
    return f"{', '.join(first)} or {last}"


def _setting(section: Section, default: Any, description: str) -> Any:
    return Field(default, description=description, json_schema_extra={"section": section})


class TrainConfig(BaseModel):
    """The settings of a run. `auto` leaves a choice to the plan, which gives its reason.

    Every key is a YAML key, a flag (`batch_size` is `--batch-size`) and an upper-case attribute of
    `Config` (`BATCH_SIZE`). Wrong types and unknown keys are errors (pydantic.ValidationError here;
    a UserError that names the file or flag where `config.loading` read them).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    # fmt: off
    data: DataSetName | None = _setting("data", None, f"data set: {', '.join(DATA_SETS)}, or the path of a folder; unset: the data set found in data_root, else digits")
    data_root: FilePath | None = _setting("data", None, "folder with the data, relative to the working directory")
    img_size: Annotated[int, Field(ge=8, le=4096)] | None = _setting("data", None, "side of the network's input images in pixels; unset: the data set's own")
    num_classes: Annotated[int, Field(ge=2, le=MAX_COUNT)] | None = _setting("data", None, "number of classes; unset: counted in the data")
    limit_train_images: PositiveInt | None = _setting("data", None, "number of training images to use, drawn evenly over the classes; unset: all")
    synthetic_train_images: PositiveInt = _setting("data", 2048, "training images of the synthetic set")
    synthetic_val_images: PositiveInt = _setting("data", 512, "validation images of the synthetic set")
    flip: Literal["auto", "none", "random", "alternating"] = _setting("data", "auto", "horizontal flips of training images: auto, none, random or alternating (each image flips every epoch)")
    crop_padding: NonNegativeInt | Auto = _setting("data", "auto", "padding in pixels for the random crop of array data sets; 0: no crop")
    cutout: NonNegativeInt = _setting("data", 0, "side in pixels of the square cut out of each training image; 0: off")
    random_erasing: Annotated[float, Field(ge=0, le=1)] = _setting("data", 0.0, "probability of erasing a random rectangle of a training image; 0: off")
    mixup: NonNegativeFloat = _setting("data", 0.0, "alpha of mixup; 0: off")
    cutmix: NonNegativeFloat = _setting("data", 0.0, "alpha of cutmix; 0: off; with mixup too, each step draws one of them")
    on_bad_image: Literal["stop", "skip"] = _setting("data", "stop", "what to do with an image that cannot be decoded: stop (name it and end) or skip (pass over it, up to 1% of a split; training lists them in bad_images.txt)")

    model: ModelName = _setting("model", "resnet18", _one_of(MODELS))
    stem: Literal["auto", "cifar", "imagenet"] = _setting("model", "auto", "first layers: cifar (3x3, stride 1, no pooling), imagenet (7x7, stride 2, pooling), or auto, from the image size")
    weights: FilePath | None = _setting("model", None, "weights to start from: a .safetensors or .pth file with torchvision's names")
    share_early_weights: bool = _setting("model", False, "share one weight between the two convolutions of each early block (resnet10, 18, 34)")
    zero_init_last_norm: bool = _setting("model", False, "start each residual block as the identity, with zeros as the scale of its last norm")

    epochs: PositiveInt = _setting("training", 15, "passes over the training set")
    batch_size: PositiveInt = _setting("training", 64, "images per forward pass, over all devices together; an optimizer step sees accumulate_grad_batches batches")
    accumulate_grad_batches: PositiveInt = _setting("training", 1, "batches whose gradients are averaged for each optimizer step")
    optimizer: OptimizerName = _setting("training", "sgd", _one_of(get_args(OptimizerName)))
    lr: PositiveFloat | Auto = _setting("training", "auto", "peak learning rate; auto: from the optimizer and the batch size")
    momentum: Fraction = _setting("training", 0.9, "momentum of sgd")
    nesterov: bool | Auto = _setting("training", "auto", "Nesterov momentum for sgd; auto: on if momentum is above 0")
    beta1: Fraction = _setting("training", 0.9, "decay of the first moment of adam and adamw")
    beta2: Fraction = _setting("training", 0.999, "decay of the second moment of adam and adamw")
    eps: PositiveFloat = _setting("training", 1e-8, "term added to the denominators of adam and adamw, to keep them above zero")
    weight_decay: NonNegativeFloat = _setting("training", 5e-4, "weight decay; by default not for norms and biases")
    decay_norm_and_bias: bool = _setting("training", False, "apply weight decay to norms and biases too")
    scheduler: ScheduleName = _setting("training", "one_cycle", f"learning-rate schedule: {_one_of(SCHEDULES)}")
    warmup_epochs: NonNegativeFloat | None = _setting("training", None, "warm-up in epochs; unset: the first 30% of one_cycle, none for other schedules")
    warmup_steps: NonNegativeInt | None = _setting("training", None, "warm-up in optimizer steps, instead of warmup_epochs")
    step_size: PositiveFloat = _setting("training", 30.0, "for scheduler step: epochs between two drops")
    milestones: tuple[PositiveFloat, ...] = _setting("training", (), "for scheduler multi_step: epochs at which the rate drops")
    gamma: Annotated[float, Field(gt=0, le=1)] = _setting("training", 0.1, "for step and multi_step: factor of each drop")
    label_smoothing: Fraction = _setting("training", 0.1, "label smoothing of the training loss")
    grad_clip_val: PositiveFloat | None = _setting("training", None, "clip gradients to this norm; unset: no clipping")
    ema_decay: Fraction = _setting("training", 0.0, "decay of the weight average, which is then evaluated and saved; 0: off")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = _setting("training", 0, "seed of all random numbers")

    accelerator: Literal["auto", "cpu", "gpu"] = _setting("machine", "auto", "auto, cpu or gpu; auto: a GPU if this PyTorch can use one, else the CPU")
    devices: PositiveInt | Auto = _setting("machine", "auto", "number of devices; more than one: start with torchrun")
    strategy: Literal["auto", "ddp"] = _setting("machine", "auto", "auto: DistributedDataParallel if torchrun starts several processes; ddp: the same, but refuse to train in one process")
    sync_batchnorm: bool = _setting("machine", False, "compute batch-norm statistics over the batches of all devices")
    precision: Precision = _setting("machine", "auto", "32, bf16-mixed, 16-mixed, mixed (the device's best of the two), or auto")
    channels_last: bool | Auto = _setting("machine", "auto", "channels-last memory format; auto: on")
    compile: bool | Auto = _setting("machine", "auto", "use torch.compile; auto: only where it pays off")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = _setting("machine", None, "mode of torch.compile; unset: reduce-overhead on a GPU, default on a CPU")
    cuda_graph: bool = _setting("machine", False, "record the whole step as CUDA graphs and replay them (one CUDA GPU, one batch per step, not fp16)")
    fused_optimizer: bool | Auto = _setting("machine", "auto", "use torch's fused optimizer; auto: where the device has one")
    small_map_convolutions: bool | Auto = _setting("machine", "auto", "compute convolutions on small feature maps as matrix products; auto: on a CPU in fp32")
    winograd_convolutions: bool | Auto = _setting("machine", "auto", "compute 3x3 convolutions by Winograd's algorithm, with kernels compiled on this machine; auto: on a CPU with AVX-512 in fp32")
    fused_norms: bool | Auto = _setting("machine", "auto", "compute batch norm, shortcut and ReLU in one pass over memory, with kernels compiled on this machine; auto: on a CPU with AVX-512 in fp32")
    keep_memory: bool | Auto = _setting("machine", "auto", "keep freed host memory for the next step instead of returning it to the system; auto: on a CPU under Linux")
    activation_checkpointing: bool = _setting("machine", False, "recompute each block's activations in the backward pass: less memory, more time")
    auto_micro_batch: bool = _setting("machine", False, "if memory runs out, halve the parts in which each batch is computed and continue with the same effective batch; batch norm sees the parts (one process)")
    threads: PositiveInt | Auto = _setting("machine", "auto", "CPU threads of PyTorch; auto: one per core, divided among the processes")
    num_workers: Annotated[int, Field(ge=0, le=1024)] | Auto = _setting("machine", "auto", "loader processes; auto: from the cores and the data set")
    prefetch_factor: PositiveInt = _setting("machine", 4, "batches that each loader process prepares in advance")
    pin_memory: bool | Auto = _setting("machine", "auto", "use page-locked host memory for copies to a GPU; auto: with a GPU")
    resident_data: bool | Auto = _setting("machine", "auto", "keep the whole data set in the device's memory; auto: if it fits well")
    deterministic: bool = _setting("machine", False, "use only deterministic algorithms, also on a GPU (slower)")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] | None = _setting("run", None, "name of the run: letters, digits, '.', '_', '-'; unset: model and data set")
    output_dir: FilePath = _setting("run", Path("logs"), "folder for runs; a run is written to <output_dir>/<name>/version_N")
    resume: Resume = _setting("run", "auto", "auto: resume the newest run of this name if it is unfinished; never: start a new run; or a checkpoint to resume from")
    allow_config_change: bool = _setting("run", False, "resume even if settings that change the result differ")
    log_every_n_steps: PositiveInt = _setting("run", 50, "steps between two logged rows")
    val_check_interval: PositiveInt | Annotated[float, Field(gt=0, allow_inf_nan=False)] = _setting("run", 1.0, "interval between evaluations: epochs as a decimal (0.5, 1.0), or steps as a whole number")
    save_every_n_steps: PositiveInt | None = _setting("run", None, "steps between checkpoints, besides those after every epoch and evaluation; unset: no such interval")
    save_every_seconds: PositiveFloat | None = _setting("run", 600.0, "seconds between checkpoints, besides those after every epoch and evaluation; null: no such interval")
    save_top_k: NonNegativeInt = _setting("run", 1, "number of best checkpoints to keep besides the last one")
    tensorboard: bool = _setting("run", True, "write TensorBoard events")
    stop_after_steps: PositiveInt | None = _setting("run", None, "stop after this many steps, as an interrupt would; the schedule remains that of the whole run")
    # fmt: on

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        fault = next(iter(_contradictions(self)), None)
        if fault:
            raise ValueError(fault)
        return self


def _contradictions(config: TrainConfig) -> list[str]:
    """Contradictions between settings, each as `fault; cure`."""
    given = config.model_fields_set
    faults = []
    if config.warmup_epochs is not None and config.warmup_steps is not None:
        faults.append("warmup_epochs and warmup_steps are both given; keep one of them")
    if (config.warmup_epochs or 0) > config.epochs:
        faults.append(
            f"warmup_epochs {config.warmup_epochs:g} is longer than the run's {config.epochs} "
            "epochs; lower warmup_epochs or raise epochs"
        )
    if config.scheduler == "multi_step" and not config.milestones:
        faults.append("scheduler multi_step has no milestones; give some, such as 30,60,80")
    if "milestones" in given and config.milestones and config.scheduler != "multi_step":
        faults.append(
            f"milestones are given but scheduler is {config.scheduler}; "
            "set scheduler to multi_step or remove milestones"
        )
    if list(config.milestones) != sorted(set(config.milestones)):
        faults.append(f"milestones {list(config.milestones)} do not increase; sort them")
    if config.nesterov is True and config.optimizer != "sgd":
        faults.append(
            f"nesterov is for sgd but optimizer is {config.optimizer}; remove nesterov or use sgd"
        )
    if config.nesterov is True and config.momentum == 0:
        faults.append("nesterov needs momentum above 0; raise momentum or remove nesterov")
    if config.share_early_weights and MODELS[config.model].block != "basic":
        basic = _one_of(name for name, found in MODELS.items() if found.block == "basic")
        faults.append(
            f"share_early_weights needs pairs of equal convolutions, which {config.model} lacks; "
            f"use {basic}, or switch it off"
        )
    if config.compile_mode is not None and config.compile is False:
        faults.append("compile_mode is given but compile is false; remove one of them")
    if config.cuda_graph and config.compile_mode in ("reduce-overhead", "max-autotune"):
        faults.append(
            f"cuda_graph records the step but compile_mode {config.compile_mode} records parts of "
            "it too; set compile_mode to default or max-autotune-no-cudagraphs"
        )
    if isinstance(config.resume, Path) and config.weights is not None:
        faults.append(
            "resume and weights are both given; remove weights: the checkpoint has its own"
        )
    if config.data and not DATA_SETS[config.data].reads_files and config.data_root is not None:
        faults.append(
            f"data is {config.data}, which reads no files, but data_root is "
            f"{str(config.data_root)!r}; remove data_root (null) or name the data set in it"
        )
    return faults


# Settings that may change when a run is resumed: they change where files are, what is recorded and
# how fast it runs, but not the result. `weights` matter only at the start of a run.
TRAJECTORY_FREE_KEYS = frozenset(
    {
        "allow_config_change", "auto_micro_batch", "data_root", "devices", "log_every_n_steps", "name", "num_workers",
        "on_bad_image", "output_dir", "pin_memory", "prefetch_factor", "resident_data", "resume",
        "save_every_n_steps", "save_every_seconds", "save_top_k",
        "stop_after_steps", "strategy", "tensorboard", "val_check_interval", "weights",
    }
)  # fmt: skip


def sections() -> dict[Section, list[str]]:
    """The keys of TrainConfig by section, in the order of their definition."""
    result: dict[Section, list[str]] = {}
    for key, field in TrainConfig.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        section: Section = extra["section"]  # type: ignore[assignment]
        result.setdefault(section, []).append(key)
    return result
