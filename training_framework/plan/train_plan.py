"""The plan of a run: every derived number and every choice, with its reason."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter

from training_framework.config.architectures import Activation, Variation
from training_framework.config.schema import OptimizerName
from training_framework.data.resolution import Resolutions
from training_framework.machine.precision import (
    Fp32Precision,
    Precision,
    ProductFormat,
    product_format,
)
from training_framework.switches import SWITCHES, Choice

__all__ = ["Choice", "TrainPlan"]


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """Everything that a run does, decided: after it, nothing reads the configuration.

    A field with the name of a setting holds its final value: the choice if it was `auto`, otherwise
    the value that was asked for (`config.schema` explains it). The other fields follow from several
    settings, or from the machine and the data. Durations are in optimizer steps.

    Attributes:
        device: PyTorch's device type, `cpu`, `cuda`, `mps`, ...
        device_indices: Number of each rank's device on its machine, by local rank.
        device_name: The processor's or accelerator's own name.
        own_network: Class of the user's own network, which replaces `model`; None: no such network.
        global_batch_size: Images of one forward pass over all ranks.
        device_batch_size: Images of one forward pass on one rank.
        evaluation_batch_size: Images of one forward pass of an evaluation over all ranks.
        images_per_step: Images of one optimizer step over all ranks.
        batches_per_epoch: Forward passes an epoch.
        steps_per_epoch: Optimizer steps an epoch; the last may have fewer batches.
        whitening_bias_steps: Steps in which the bias of a whitening first convolution is trained.
        norm_momentum: Share of a step in batch norm's running statistics; None: as it was built.
        evaluation_interval_steps: Steps between two evaluations, not necessarily whole.
        more_switches: Values of the switches that have no field of their own, by key.
        asked_for: Settings that can be left to the plan, but were given.
        choices: Every decision with its reason, for people.
    """

    # The machine, and how the work is shared.
    device: str
    device_indices: tuple[int, ...]
    device_name: str
    world_size: int
    threads: int
    deterministic: bool
    keep_memory: bool
    auto_micro_batch: bool
    # The network.
    model: str
    own_network: str | None
    stem: Literal["cifar", "imagenet"]
    num_classes: int
    weights: Path | None
    activation: Activation
    squeeze_excitation: bool
    blur_pool: bool
    deep_stem: bool
    pooled_shortcut: bool
    whitening: bool
    whitening_bias_steps: int
    share_early_weights: bool
    zero_init_last_norm: bool
    dirac_init: bool
    norm_momentum: float | None
    freeze_norm_scales: bool
    # How a step is computed.
    precision: Precision
    fp32_precision: Fp32Precision
    channels_last: bool
    compile: bool
    compile_mode: Literal[
        "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
    ]
    cuda_graph: bool
    fused_optimizer: bool
    small_map_convolutions: bool
    winograd_convolutions: bool
    bf16_products: bool
    fused_norms: bool
    sync_batchnorm: bool
    activation_checkpointing: bool
    # How the data is loaded and augmented.
    image_size: int
    flip: Literal["none", "random", "alternating"]
    crop_padding: int
    cutout: int
    random_erasing: float
    mixup: float
    cutmix: float
    color_jitter: float
    auto_augment: Literal["none", "trivial", "rand"]
    rand_augment_operations: int
    rand_augment_magnitude: int
    progressive_resolution: tuple[tuple[float, int], ...]
    eval_img_size: int
    on_bad_image: Literal["stop", "skip"]
    resident_data: bool
    num_workers: int
    prefetch_factor: int
    pin_memory: bool
    # Batches and steps.
    seed: int
    epochs: int | float
    global_batch_size: int
    device_batch_size: int
    evaluation_batch_size: int
    accumulate_grad_batches: int
    images_per_step: int
    batches_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    # The optimizer.
    optimizer: OptimizerName
    lr: float
    bias_lr_factor: float
    momentum: float
    nesterov: bool
    muon_momentum: float
    muon_iterations: int
    muon_normalize: bool
    muon_rest: Literal["sgd", "adamw"]
    muon_rest_lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decay_norm_and_bias: bool
    label_smoothing: float
    grad_clip_val: float | None
    ema_decay: float
    lookahead_steps: int
    lookahead_share: float
    average_from: float
    recompute_norm_batches: int
    train_on_hardest: float
    tta: Literal["none", "mirror", "mirror-translate"]
    # The schedule of the learning rate.
    scheduler: str
    warmup_steps: int | None
    step_size_steps: int
    milestones_steps: tuple[int, ...]
    gamma: float
    decay_fraction: float
    final_lr_fraction: float
    # What is logged and saved, and where.
    name: str
    output_dir: Path
    resume: Literal["auto", "never"] | Path
    allow_config_change: bool
    stop_after_steps: int | None
    evaluation_interval_steps: float
    log_every_n_steps: int
    tensorboard: bool
    save_every_n_steps: int | None
    save_every_seconds: float | None
    save_top_k: int
    more_switches: Mapping[str, Any]
    asked_for: tuple[str, ...]
    choices: tuple[Choice, ...]

    @property
    def resolutions(self) -> Resolutions | None:
        """The size of the training images by epoch; None: always `image_size`."""
        if not self.progressive_resolution:
            return None
        return Resolutions.of(self.progressive_resolution, self.epochs)

    @property
    def total_batches(self) -> int:
        """Forward passes of the whole run."""
        return max(1, round(self.epochs * self.batches_per_epoch))

    def group_size(self, epoch: int, batch: int) -> int:
        """Forward passes of the step that starts with a batch of an epoch, both counted from 0.

        The last step of an epoch may have fewer, and so may the last of a run that ends in one.
        """
        done = epoch * self.batches_per_epoch
        left = min(self.batches_per_epoch, self.total_batches - done) - batch
        return min(self.accumulate_grad_batches, left)

    @property
    def steps_loaded_ahead(self) -> int:
        """Steps that the loader processes may have prepared ahead."""
        batches = 0 if self.resident_data else self.num_workers * self.prefetch_factor
        return -(-batches // self.accumulate_grad_batches)

    @property
    def variation(self) -> Variation:
        """What is changed in the network's architecture."""
        return Variation(*(getattr(self, key) for key in Variation._fields))

    @property
    def averages_weights(self) -> bool:
        """Whether an average of the weights is evaluated and saved."""
        return bool(self.ema_decay or self.average_from)

    def switch_values(self) -> dict[str, Any]:
        """The value of every switch, by key."""
        return {
            switch.key: (
                self.more_switches[switch.key]
                if switch.key in self.more_switches
                else getattr(self, switch.key)
            )
            for switch in SWITCHES
        }

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows `step` (counted from 1); one follows the last."""
        interval = self.evaluation_interval_steps
        # Without the small term, rounding would make 0.1 of 30 steps one step late.
        crossed = math.floor(step / interval + 1e-9) > math.floor((step - 1) / interval + 1e-9)
        return crossed or step == self.total_steps

    def torch_device(self, local_rank: int) -> torch.device:
        """The device of the process with that rank on its machine."""
        if self.device == "cpu":
            return torch.device("cpu")
        return torch.device(self.device, self.device_indices[local_rank])

    @property
    def product_format(self) -> ProductFormat:
        """What the network's convolutions and matrix products multiply."""
        return product_format(self.precision, self.fp32_precision)

    def as_dict(self) -> dict[str, Any]:
        """Plain values (numbers, text, lists, mappings) for checkpoints and run.json."""
        values: dict[str, Any] = TypeAdapter(TrainPlan).dump_python(self, mode="json")
        return values

    @classmethod
    def from_dict(cls, values: Any) -> "TrainPlan":
        """The plan from the values that `as_dict` returned.

        Raises:
            ValueError: The values are not a plan.
        """
        plan: TrainPlan = TypeAdapter(cls).validate_python(values)
        return plan
