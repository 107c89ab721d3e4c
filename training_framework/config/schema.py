"""The configuration: flat, typed, frozen and validated."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from training_framework.config.architectures import MODELS, Activation, Variation, unfit_options
from training_framework.config.data_sets import DATA_SETS
from training_framework.schedules import SCHEDULES, schedule_options

__all__ = [
    "TRAJECTORY_FREE_KEYS",
    "OptimizerName",
    "Section",
    "TrainConfig",
    "as_in_model",
    "sections",
]

Section = Literal["data", "model", "training", "machine", "run"]

Auto = Literal["auto"]
MAX_COUNT = 2**53  # largest integer up to which a float counts exactly; far above any real count
PositiveInt = Annotated[int, Field(ge=1, le=MAX_COUNT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
ImageSize = Annotated[int, Field(ge=8, le=4096)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Epochs = Annotated[
    float,
    Field(gt=0, le=MAX_COUNT),
    AfterValidator(lambda epochs: int(epochs) if epochs == int(epochs) else epochs),
]


def _plain_precision(value: Any) -> Any:
    # YAML reads `precision: 32` as a number, and other trainers write 32-true.
    return "32" if value in (32, "32-true") and not isinstance(value, bool) else value


Precision = Annotated[
    Literal["auto", "32", "mixed", "bf16-mixed", "16-mixed"], BeforeValidator(_plain_precision)
]
OptimizerName = Literal["sgd", "adam", "adamw", "muon"]
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
    img_size: ImageSize | None = _setting("data", None, "side of the network's input images in pixels; unset: the data set's own")
    eval_img_size: ImageSize | None = _setting("data", None, "side of the images that are evaluated, in pixels; unset: img_size")
    progressive_resolution: tuple[tuple[Fraction, ImageSize], ...] = _setting("data", (), "sizes of the training images over a run, as [[0, 96], [0.6, 128]]: 96 px, and from 60% of the epochs on 128 px; unset: img_size")
    num_classes: Annotated[int, Field(ge=2, le=MAX_COUNT)] | None = _setting("data", None, "number of classes; unset: counted in the data")
    limit_train_images: PositiveInt | None = _setting("data", None, "number of training images to use, drawn evenly over the classes; unset: all")
    synthetic_train_images: PositiveInt = _setting("data", 2048, "training images of the synthetic set")
    synthetic_val_images: PositiveInt = _setting("data", 512, "validation images of the synthetic set")
    flip: Literal["auto", "none", "random", "alternating"] = _setting("data", "auto", "horizontal flips of training images: auto, none, random or alternating (each image flips every epoch)")
    crop_padding: NonNegativeInt | Auto = _setting("data", "auto", "padding in pixels for the random crop of array data sets; 0: no crop")
    cutout: NonNegativeInt = _setting("data", 0, "side in pixels of the square cut out of each training image; 0: off")
    random_erasing: Annotated[float, Field(ge=0, le=1)] = _setting("data", 0.0, "probability of erasing a random rectangle of a training image; 0: off")
    color_jitter: Annotated[float, Field(ge=0, le=1)] = _setting("data", 0.0, "largest change of brightness, contrast and saturation of a training image, as a share; 0: off")
    auto_augment: Literal["none", "trivial", "rand"] = _setting("data", "none", "random operations on colors and shapes: trivial (TrivialAugment), rand (RandAugment) or none")
    rand_augment_operations: Annotated[int, Field(ge=1, le=16)] = _setting("data", 2, "for auto_augment rand: operations for each image")
    rand_augment_magnitude: Annotated[int, Field(ge=0, le=30)] = _setting("data", 9, "for auto_augment rand: strength of its operations, 0 to 30")
    mixup: NonNegativeFloat = _setting("data", 0.0, "alpha of mixup; 0: off")
    cutmix: NonNegativeFloat = _setting("data", 0.0, "alpha of cutmix; 0: off; with mixup too, each step draws one of them")
    on_bad_image: Literal["stop", "skip"] = _setting("data", "stop", "what to do with an image that cannot be decoded: stop (name it and end) or skip (leave it out, up to 1% of a split; training lists them in bad_images.txt)")

    model: ModelName = _setting("model", "resnet18", _one_of(MODELS))
    stem: Literal["auto", "cifar", "imagenet"] = _setting("model", "auto", "first layers: cifar (3x3, stride 1, no pooling), imagenet (7x7, stride 2, pooling), or auto, from the image size")
    weights: FilePath | None = _setting("model", None, "weights to start from: a .safetensors or .pth file with torchvision's names")
    activation: Activation | Auto = _setting("model", "auto", f"activation function: {_one_of(get_args(Activation))}; auto: the model's own, relu for most")
    squeeze_excitation: bool | Auto = _setting("model", "auto", "squeeze and excitation in each block; auto: on if the model's name has se")
    blur_pool: bool | Auto = _setting("model", "auto", "blur before each reduction of the maps; auto: on if the model's name has blur")
    deep_stem: bool | Auto = _setting("model", "auto", "three 3x3 convolutions instead of the first one; auto: on if the model's name ends in c or d")
    pooled_shortcut: bool | Auto = _setting("model", "auto", "reduce projected shortcuts by an average instead of a stride; auto: on if the model's name ends in d")
    whitening: bool | Auto = _setting("model", "auto", "first convolution with fixed filters that whiten patches of the training images; auto: on for resnet8_fast")
    whitening_bias_epochs: NonNegativeFloat = _setting("model", 3.0, "epochs in which the bias of a whitening first convolution is trained")
    share_early_weights: bool = _setting("model", False, "share one weight between the two convolutions of each early block (resnet10, 18, 34)")
    zero_init_last_norm: bool = _setting("model", False, "start each residual block as the identity, with zeros as the scale of its last norm")
    dirac_init: bool | Auto = _setting("model", "auto", "start 3x3 convolutions as the identity for as many channels as they read; auto: on for resnet8_fast")
    norm_momentum: Annotated[float, Field(gt=0, le=1)] | Auto = _setting("model", "auto", "share of a step in batch norm's running statistics; auto: 0.1, and 0.4 for resnet8_fast")
    freeze_norm_scales: bool | Auto = _setting("model", "auto", "do not train the scales of batch norm; auto: on for resnet8_fast")

    epochs: Epochs = _setting("training", 15, "passes over the training set; 9.9 ends within the last one")
    batch_size: PositiveInt = _setting("training", 64, "images per forward pass, over all devices together; an optimizer step sees accumulate_grad_batches batches")
    accumulate_grad_batches: PositiveInt = _setting("training", 1, "batches whose gradients are averaged for each optimizer step")
    optimizer: OptimizerName = _setting("training", "sgd", _one_of(get_args(OptimizerName)))
    lr: PositiveFloat | Auto = _setting("training", "auto", "peak learning rate; auto: from the optimizer and the batch size")
    momentum: Fraction = _setting("training", 0.9, "momentum of sgd")
    nesterov: bool | Auto = _setting("training", "auto", "Nesterov momentum for sgd; auto: on if momentum is above 0")
    muon_momentum: Fraction = _setting("training", 0.6, "momentum of the convolutions with muon, always Nesterov's")
    muon_iterations: Annotated[int, Field(ge=1, le=10)] = _setting("training", 3, "Newton-Schulz iterations of muon")
    muon_normalize: bool = _setting("training", True, "with muon, scale each convolution's weight before its update so that its filters have a mean square norm of 1")
    muon_rest: Literal["sgd", "adamw"] = _setting("training", "sgd", "what updates the weights that muon leaves alone: head, norms, biases")
    muon_rest_lr: PositiveFloat | Auto = _setting("training", "auto", "peak learning rate of muon_rest; auto: as lr for that optimizer alone")
    bias_lr_factor: PositiveFloat = _setting("training", 1.0, "learning rate of norms and biases, as a multiple of the others'")
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
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = _setting("training", 0.2, "for scheduler trapezoid: share of the run, at its end, in which the rate falls")
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)] = _setting("training", 0.0, f"rate at the end, as a share of the peak, for scheduler {_one_of(name for name in SCHEDULES if 'final_fraction' in schedule_options(name))}")
    gamma: Annotated[float, Field(gt=0, le=1)] = _setting("training", 0.1, "for step and multi_step: factor of each drop")
    train_on_hardest: Fraction = _setting("training", 0.0, "share of each batch that is trained on: the images with the largest loss; 0: all of it")
    label_smoothing: Fraction = _setting("training", 0.1, "label smoothing of the training loss")
    grad_clip_val: PositiveFloat | None = _setting("training", None, "clip gradients to this norm; unset: no clipping")
    ema_decay: Fraction = _setting("training", 0.0, "decay of the weight average, which is then evaluated and saved; 0: off")
    lookahead_steps: NonNegativeInt = _setting("training", 0, "steps after which the weights go back towards slow weights; 0: off")
    lookahead_share: Annotated[float, Field(gt=0, lt=1)] = _setting("training", 0.5, "for lookahead_steps: share of the way that the slow weights go")
    average_from: Fraction = _setting("training", 0.0, "share of the run from which on the weights are averaged evenly (SWA), evaluated and saved; 0: off")
    recompute_norm_batches: NonNegativeInt = _setting("training", 0, "training batches from which the norms of the weight average get new statistics before each evaluation; 0: averaged like the weights")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = _setting("training", 0, "seed of all random numbers")

    accelerator: Literal["auto", "cpu", "gpu"] = _setting("machine", "auto", "auto, cpu or gpu; auto: a GPU if this PyTorch can use one, else the CPU")
    devices: PositiveInt | Auto = _setting("machine", "auto", "number of devices; more than one: start with torchrun")
    strategy: Literal["auto", "ddp"] = _setting("machine", "auto", "auto: DistributedDataParallel if torchrun starts several processes; ddp: the same, but refuse to train in one process")
    sync_batchnorm: bool = _setting("machine", False, "compute batch-norm statistics over the batches of all devices")
    precision: Precision = _setting("machine", "auto", "32, bf16-mixed, 16-mixed, mixed (the device's best of the two), or auto")
    fp32_precision: Literal["auto", "ieee", "tf32"] = _setting("machine", "auto", "products in precision 32 on a CUDA GPU: ieee (24 bits of each factor), tf32 (11 bits, on tensor cores), or auto (tf32 where the GPU has it)")
    channels_last: bool | Auto = _setting("machine", "auto", "channels-last memory format; auto: on")
    pad_stem: bool = _setting("machine", False, "pad the images to four channels for the first convolution")
    master_weights: bool = _setting("machine", False, "in mixed precision, compute with half-precision copies of the weights, made together from their fp32 masters in each forward pass (one process, not compiled)")
    compile: bool | Auto = _setting("machine", "auto", "use torch.compile; auto: only where it pays off")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = _setting("machine", None, "mode of torch.compile; unset: reduce-overhead on a single NVIDIA GPU whose steps are not recorded, else default")
    cuda_graph: bool | Auto = _setting("machine", "auto", "record the whole step as CUDA graphs and replay them (CUDA GPUs, one batch per step, not fp16); auto: on one GPU, where that works and the run is long enough")
    fused_optimizer: bool | Auto = _setting("machine", "auto", "use torch's fused optimizer; auto: where the device has one")
    small_map_convolutions: bool | Auto = _setting("machine", "auto", "compute convolutions on small feature maps as matrix products; auto: on a CPU in fp32")
    winograd_convolutions: bool | Auto = _setting("machine", "auto", "compute 3x3 convolutions by Winograd's algorithm, with kernels compiled on this machine; auto: on a CPU with AVX-512 in fp32")
    bf16_products: bool | Auto = _setting("machine", "auto", "compute the products of Winograd's convolutions in bf16; all else stays in fp32; auto: on a CPU with fast avx512_bf16 if precision is auto")
    fused_norms: bool | Auto = _setting("machine", "auto", "compute batch norm, shortcut and activation in one pass over memory, with kernels compiled on this machine; auto: on a CPU with AVX-512 in fp32")
    keep_memory: bool | Auto = _setting("machine", "auto", "keep freed host memory for the next step instead of returning it to the system; auto: on a CPU under Linux")
    activation_checkpointing: bool = _setting("machine", False, "recompute each block's activations in the backward pass: less memory, more time")
    auto_micro_batch: bool | Auto = _setting("machine", "auto", "if memory runs out, halve the parts in which each batch is computed and continue with the same effective batch; batch norm sees the parts (one process); auto: on a GPU whose memory seems too small")
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
    tta: Literal["none", "mirror", "mirror-translate"] = _setting("run", "none", "accuracy with test-time augmentation, reported beside the plain one: mirror (2 views), mirror-translate (6 views) or none")
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


def _schedule_contradictions(config: TrainConfig) -> list[str]:
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
    if config.final_lr_fraction and "final_fraction" not in schedule_options(config.scheduler):
        faults.append(
            f"final_lr_fraction is given but scheduler is {config.scheduler}; "
            "remove final_lr_fraction or use linear"
        )
    if list(config.milestones) != sorted(set(config.milestones)):
        faults.append(f"milestones {list(config.milestones)} do not increase; sort them")
    return faults


def _contradictions(config: TrainConfig) -> list[str]:
    """Contradictions between settings, each as `fault; cure`."""
    faults = _schedule_contradictions(config)
    if config.average_from and config.ema_decay:
        faults.append("average_from and ema_decay are both given; keep one of them")
    shares = [share for share, _ in config.progressive_resolution]
    if shares and (shares[0] != 0 or shares != sorted(set(shares))):
        faults.append(
            f"progressive_resolution has the shares {shares}; start at 0 and let them grow"
        )
    beside = config.muon_rest if config.optimizer == "muon" else config.optimizer
    if config.nesterov is True and beside != "sgd":
        faults.append(f"nesterov is for sgd but optimizer is {beside}; remove nesterov or use sgd")
    if config.muon_rest_lr != "auto" and config.optimizer != "muon":
        faults.append(
            f"muon_rest_lr is given but optimizer is {config.optimizer}; "
            "set optimizer to muon or remove muon_rest_lr"
        )
    if config.nesterov is True and config.momentum == 0:
        faults.append("nesterov needs momentum above 0; raise momentum or remove nesterov")
    faults += _contradictions_of_network(config)
    if config.compile_mode is not None and config.compile is False:
        faults.append("compile_mode is given but compile is false; remove one of them")
    if config.cuda_graph is True and config.compile_mode in ("reduce-overhead", "max-autotune"):
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


def _contradictions_of_network(config: TrainConfig) -> list[str]:
    faults = []
    architecture = MODELS[config.model]
    if config.share_early_weights and architecture.block != "basic":
        basic = _one_of(name for name, found in MODELS.items() if found.block == "basic")
        faults.append(
            f"share_early_weights needs pairs of equal convolutions, which {config.model} lacks; "
            f"use {basic}, or switch it off"
        )
    chosen = {key: as_in_model(config, key) for key in Variation._fields}
    unfit = [*unfit_options(architecture._replace(variation=Variation(**chosen)))]
    if unfit:
        faults.append(
            f"{config.model} has no {' or '.join(unfit)}; switch it off or use another model"
        )
    if chosen["deep_stem"] and as_in_model(config, "whitening"):
        faults.append(
            "whitening needs a single first convolution but deep_stem makes three; switch one off"
        )
    if config.zero_init_last_norm and as_in_model(config, "freeze_norm_scales"):
        faults.append(
            "zero_init_last_norm starts scales at zero but freeze_norm_scales leaves them there; "
            "switch one off"
        )
    if (
        config.zero_init_last_norm
        and architecture.block == "preactivated"
        and chosen["activation"] == "relu"
    ):
        faults.append(
            f"zero_init_last_norm: a relu follows the last norm in a block of {config.model} and "
            "gives a scale of zero no gradient; switch zero_init_last_norm off"
        )
    return faults


def as_in_model(config: TrainConfig, key: str) -> Any:
    """A setting's value; if it is `auto`, the one that the configured model has by itself."""
    wanted = getattr(config, key)
    if wanted != "auto":
        return wanted
    architecture = MODELS[config.model]
    return getattr(architecture.variation if key in Variation._fields else architecture, key)


# Settings that may change when a run is resumed: they change where files are, what is recorded and
# how fast it runs, but not the result. `weights` matter only at the start of a run.
TRAJECTORY_FREE_KEYS = frozenset(
    {
        "allow_config_change", "auto_micro_batch", "data_root", "devices", "log_every_n_steps", "name", "num_workers",
        "on_bad_image", "output_dir", "pin_memory", "prefetch_factor", "resident_data", "resume",
        "save_every_n_steps", "save_every_seconds", "save_top_k",
        "stop_after_steps", "strategy", "tensorboard", "tta", "val_check_interval", "weights",
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
