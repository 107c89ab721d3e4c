"""Whether a batch fits the memory of a GPU, by an estimate."""

import functools
from typing import Literal

import torch

from training_framework.config.architectures import Variation
from training_framework.config.schema import as_in_model
from training_framework.models import build_model
from training_framework.models.memory import TrainingMemory, training_memory
from training_framework.switches.switch import Decision, Situation

__all__ = ["choose_micro_batching"]

# The rest is for the driver, workspaces of kernels and gaps between tensors.
USABLE_SHARE = 0.9
# A GPU without memory of its own shares the host's with all other programs.
USABLE_SHARE_OF_HOST = 0.6


def choose_micro_batching(situation: Situation) -> Decision:
    """The choice of `auto_micro_batch`: on for one process on a GPU whose memory seems too small.

    The estimate is that of our own networks, and without recomputed activations.
    """
    config = situation.config
    wanted = config.auto_micro_batch
    if wanted != "auto":
        return Decision(wanted)
    recomputed = situation.chosen["activation_checkpointing"]
    if not situation.on_gpu or situation.own_network or recomputed:
        return Decision(False)
    gpu = situation.accelerators[0]
    memory = gpu.memory_bytes or situation.hardware.memory_bytes
    usable = memory * (USABLE_SHARE if gpu.memory_bytes else USABLE_SHARE_OF_HOST)
    images = min(config.batch_size, situation.facts.train_images) // situation.world_size
    needed = _estimated_bytes(situation, images)
    figures = (
        f"{images} images at once take about {needed / 2**30:.1f} of {memory / 2**30:.0f} GB by "
        "estimate"
    )
    if needed <= usable:
        return Decision(False, figures)
    if situation.world_size > 1:
        return Decision(False, f"{figures}: lower batch_size if memory runs out")
    return Decision(True, figures)


def _estimated_bytes(situation: Situation, images: int) -> float:
    config, chosen = situation.config, situation.chosen
    network = _network_memory(
        config.model,
        situation.facts.num_classes or 1,
        situation.stem,
        Variation(*(as_in_model(config, key) for key in Variation._fields)),
        situation.facts.image_size,
    )
    mixed = chosen["precision"] != "32"
    # Weights and gradients; what the optimizer keeps for each weight; the average; the copy that
    # autocast makes in half precision.
    copies = 2 + (1 if config.optimizer == "sgd" else 2) + (config.ema_decay > 0) + 0.5 * mixed
    activations = images * network.activation_bytes * (0.5 if mixed else 1)
    data = situation.facts.array_bytes if chosen["resident_data"] else 0
    return activations + copies * network.weight_bytes + data


@functools.cache
def _network_memory(
    model: str,
    num_classes: int,
    stem: Literal["cifar", "imagenet"],
    variation: Variation,
    image_size: int,
) -> TrainingMemory:
    with torch.device("meta"):
        network = build_model(model, num_classes=num_classes, stem=stem, variation=variation)
    return training_memory(network, image_size)
