"""From configuration, machine and data to the plan of a run."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from training_framework.config import TrainConfig
from training_framework.data.facts import DatasetFacts
from training_framework.errors import UserError
from training_framework.machine.hardware import Accelerator, Hardware
from training_framework.plan.machine import check_processes, choose_accelerators
from training_framework.plan.train_plan import TrainPlan
from training_framework.switches import Choices, Situation, choose_all

__all__ = ["make_plan"]

LARGEST_CIFAR_STEM_PIXELS = 64
LEARNING_RATE_PER_64_IMAGES = 0.1
MUON_LEARNING_RATE = 0.24
UNNORMALIZED_MUON_LEARNING_RATE = 0.02
SMALLEST_EVALUATION_BATCH = 64
# Beyond it, a GPU's kernels gain nothing from more images.
LARGEST_EVALUATION_BATCH = 1024
EVALUATION_MEMORY_SHARE = 1 / 8
# An estimate: four maps of the widest stage in fp32. The cifar stem keeps all pixels and the
# widest network has 256 channels there; the imagenet stem keeps a quarter, then a sixteenth.
EVALUATION_BYTES_PER_PIXEL = {"cifar": 4 * 4 * 256, "imagenet": 4 * 4 * 64}
# Settings that the plan takes over as they are.
_AS_ASKED = (
    "allow_config_change", "beta1", "beta2", "decay_fraction", "decay_norm_and_bias", "epochs",
    "eps", "final_lr_fraction", "gamma", "log_every_n_steps", "lookahead_share", "model",
    "muon_iterations", "muon_momentum", "muon_normalize", "muon_rest", "on_bad_image",
    "output_dir", "rand_augment_magnitude", "rand_augment_operations", "resume",
    "save_every_n_steps", "save_every_seconds", "save_top_k", "scheduler", "seed",
    "stop_after_steps", "tensorboard", "weight_decay", "weights",
)  # fmt: skip


def make_plan(
    config: TrainConfig,
    hardware: Hardware,
    facts: DatasetFacts,
    *,
    world_size: int = 1,
    local_world_size: int = 1,
    batches_per_epoch: int | None = None,
    own_network: str | None = None,
) -> TrainPlan:
    """Decide everything that the configuration leaves open. The resulting plan is final.

    Args:
        config: What is asked for.
        hardware: The machine.
        facts: The data set.
        world_size: Processes that train together (torchrun's WORLD_SIZE).
        local_world_size: The number of these on this machine.
        batches_per_epoch: As given by the user's own loader; None: follows from the images.
        own_network: The class of a given network that is used instead of a new `config.model`.

    Raises:
        UserError: The configuration cannot be used on this machine.
    """
    choices = Choices()
    accelerators = choose_accelerators(
        config, hardware, local_world_size=local_world_size, choices=choices
    )
    check_processes(
        config,
        accelerators,
        world_size=world_size,
        local_world_size=local_world_size,
        choices=choices,
    )
    durations = _durations(config, facts, world_size, batches_per_epoch, choices)
    stem = _stem(config, facts, choices)
    rates = _rates(config, durations["images_per_step"], choices)
    situation = Situation(
        config=config,
        hardware=hardware,
        facts=facts,
        accelerators=accelerators,
        world_size=world_size,
        local_world_size=local_world_size,
        total_steps=durations["total_steps"],
        stem=stem,
        own_network=own_network is not None,
    )
    chosen = choose_all(situation)
    switches, more_switches = _by_field(chosen.values)
    evaluation_batch_size = _evaluation_batch_size(
        situation, resident_data=switches["resident_data"], choices=choices
    )
    return TrainPlan(
        world_size=world_size,
        own_network=own_network,
        stem=stem,
        num_classes=_num_classes(config, facts),
        image_size=facts.image_size,
        eval_img_size=_evaluation_size(config, facts),
        nesterov=_nesterov(config),
        evaluation_batch_size=evaluation_batch_size,
        momentum=config.momentum if _uses_sgd(config) else 0.0,
        name=config.name or f"{own_network or config.model}-{facts.name}",
        more_switches=more_switches,
        asked_for=_asked_for(config),
        choices=(*choices, *chosen.choices),
        **_device(accelerators, hardware),
        **switches,
        **durations,
        **rates,
        **{key: getattr(config, key) for key in _AS_ASKED},
    )


def _device(accelerators: tuple[Accelerator, ...], hardware: Hardware) -> dict[str, Any]:
    return {
        "device": accelerators[0].kind if accelerators else "cpu",
        "device_indices": tuple(gpu.index for gpu in accelerators),
        "device_name": accelerators[0].name if accelerators else hardware.cpu_name,
    }


def _by_field(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The switches' values for which TrainPlan has a field, and the others."""
    fields = {field.name for field in dataclasses.fields(TrainPlan)}
    own = {key: value for key, value in values.items() if key in fields}
    return own, {key: value for key, value in values.items() if key not in fields}


def _asked_for(config: TrainConfig) -> tuple[str, ...]:
    fields = TrainConfig.model_fields.items()
    left_to_us = (key for key, field in fields if field.default == "auto")
    return tuple(key for key in left_to_us if getattr(config, key) != "auto")


def _durations(
    config: TrainConfig,
    facts: DatasetFacts,
    world_size: int,
    given_batches: int | None,
    choices: Choices,
) -> dict[str, Any]:
    batch = config.batch_size
    if given_batches is not None:
        batches = given_batches
    elif facts.train_images < batch:
        batches = 1
        choices.note(
            "batch", facts.train_images, f"the whole training set, fewer than {batch} images"
        )
        batch = facts.train_images
    else:
        batches = facts.train_images // batch
    accumulate = config.accumulate_grad_batches
    steps = math.ceil(batches / accumulate)
    whole_epochs, rest = divmod(max(1, round(config.epochs * batches)), batches)
    total = whole_epochs * steps + math.ceil(rest / accumulate)
    warmup = config.warmup_steps
    if config.warmup_epochs is not None:
        warmup = round(config.warmup_epochs * steps)
    interval = config.val_check_interval
    return {
        "global_batch_size": batch,
        "device_batch_size": batch // world_size,
        "images_per_step": batch * accumulate,
        "batches_per_epoch": batches,
        "steps_per_epoch": steps,
        "total_steps": total,
        "warmup_steps": warmup,
        "step_size_steps": max(1, round(config.step_size * steps)),
        "whitening_bias_steps": round(config.whitening_bias_epochs * steps),
        "milestones_steps": tuple(round(epoch * steps) for epoch in config.milestones),
        "evaluation_interval_steps": (
            float(interval) if isinstance(interval, int) else max(1.0, interval * steps)
        ),
    }


def _evaluation_batch_size(situation: Situation, *, resident_data: bool, choices: Choices) -> int:
    """Images of an evaluation's forward pass, over all ranks.

    Without a backward pass, a batch takes little memory, and small ones are slow: they launch as
    many kernels. A loader that decodes images is slower than either, and needs no large batches.
    """
    facts, world_size = situation.facts, situation.world_size
    usual = max(situation.config.batch_size, SMALLEST_EVALUATION_BATCH * world_size)
    memory = min((gpu.memory_bytes for gpu in situation.accelerators), default=0)
    image_bytes = EVALUATION_BYTES_PER_PIXEL[situation.stem] * facts.image_size**2
    fitting = int(memory * EVALUATION_MEMORY_SHARE) // image_bytes
    most = min(fitting, LARGEST_EVALUATION_BATCH, facts.val_images // world_size)
    if not resident_data or most * world_size <= usual:
        return usual
    size = 2 ** (most.bit_length() - 1) * world_size  # the power of two below
    if size <= usual:
        return usual
    choices.note("evaluation batch", size, "fits in 1/8 of the GPU's memory (estimate)")
    return size


def _stem(
    config: TrainConfig, facts: DatasetFacts, choices: Choices
) -> Literal["cifar", "imagenet"]:
    image_size = facts.image_size
    wanted = config.stem
    if wanted != "auto":
        choices.note("stem", wanted, "asked for")
        return wanted
    enlarged = facts.enlarged
    if image_size > LARGEST_CIFAR_STEM_PIXELS:
        choices.note("stem", "imagenet", f"{image_size} px images are large")
        return "imagenet"
    if enlarged >= 4:
        reason = (
            f"{image_size // enlarged} px originals enlarged {enlarged}x: "
            "reducing 4x at once loses nothing"
        )
        choices.note("stem", "imagenet", reason)
        return "imagenet"
    choices.note("stem", "cifar", f"{image_size} px images are small")
    return "cifar"


def _num_classes(config: TrainConfig, facts: DatasetFacts) -> int:
    wanted, found = config.num_classes, facts.num_classes
    if wanted is not None and found and wanted != found:
        raise UserError(
            f"num_classes is {wanted} but {facts.name} has {found} classes",
            f"drop num_classes, or give data with {wanted} classes",
        )
    if not found and wanted is None:
        raise UserError(
            "num_classes is not known from a DataLoader", "set num_classes (NUM_CLASSES)"
        )
    return wanted or found


def _evaluation_size(config: TrainConfig, facts: DatasetFacts) -> int:
    if config.eval_img_size is not None and facts.storage == "loader":
        raise UserError(
            "eval_img_size is for data sets, but your own loader sets the size of its images",
            "remove eval_img_size",
        )
    return config.eval_img_size or facts.image_size


def _rates(config: TrainConfig, images_per_step: int, choices: Choices) -> dict[str, Any]:
    trained_images = images_per_step * (config.train_on_hardest or 1)
    return {
        "lr": _learning_rate(config, trained_images, choices),
        "muon_rest_lr": _muon_rest_lr(config, trained_images, choices),
    }


def _learning_rate(config: TrainConfig, images_per_step: float, choices: Choices) -> float:
    if config.lr != "auto":
        return config.lr
    if config.optimizer == "muon":
        lr, reason = _muon_rate(config)
    else:
        lr, reason = _usual_rate(config.optimizer, images_per_step)
    choices.note("lr", f"{lr:.4g}", reason)
    return lr


def _muon_rate(config: TrainConfig) -> tuple[float, str]:
    if config.muon_normalize:
        return MUON_LEARNING_RATE, "for normalized weights, as in airbench94_muon"
    return UNNORMALIZED_MUON_LEARNING_RATE, "muon's usual rate"


def _muon_rest_lr(config: TrainConfig, images_per_step: float, choices: Choices) -> float:
    if config.muon_rest_lr != "auto":
        return config.muon_rest_lr
    lr, reason = _usual_rate(config.muon_rest, images_per_step)
    if config.optimizer == "muon":
        choices.note("muon_rest_lr", f"{lr:.4g}", reason)
    return lr


def _usual_rate(optimizer: str, images_per_step: float) -> tuple[float, str]:
    if optimizer == "sgd":
        lr = LEARNING_RATE_PER_64_IMAGES * images_per_step / 64
        return lr, f"{LEARNING_RATE_PER_64_IMAGES} for every 64 images of a step"
    lr = 1e-3 * math.sqrt(images_per_step / 256)
    return lr, "0.001 at 256 images a step, times the square root of the batch's growth"


def _uses_sgd(config: TrainConfig) -> bool:
    return config.optimizer == "sgd" or (config.optimizer, config.muon_rest) == ("muon", "sgd")


def _nesterov(config: TrainConfig) -> bool:
    if config.nesterov == "auto":
        return _uses_sgd(config) and config.momentum > 0
    return config.nesterov
