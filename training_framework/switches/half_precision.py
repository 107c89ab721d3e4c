"""Switches that only help in half precision: padded images, and weights cast together."""

from collections.abc import Iterator

from torch import nn

from training_framework.models import pad_stem
from training_framework.switches.switch import (
    Card,
    Decision,
    Network,
    Situation,
    Switch,
    Trial,
    as_asked,
    off_and_on,
    turned,
)

__all__ = ["HALF_PRECISION"]


def _pad_stem(model: nn.Module, network: Network) -> None:
    pad_stem(model)


def _pad_stem_trials(situation: Situation) -> Iterator[Trial]:
    chosen = situation.chosen
    if situation.on_cuda and chosen["channels_last"] and chosen["precision"] != "32":
        yield from turned("pad_stem", "padded stem")(situation)


PAD_STEM = Switch(
    key="pad_stem",
    name="padded stem",
    numbers="rounding",
    choose=as_asked("pad_stem"),
    change_network=_pad_stem,
    ablation=off_and_on("pad_stem"),
    ablation_needs=("gpu",),
    dimension="padded stem",
    trials=_pad_stem_trials,
    card=Card(
        use="CUDA GPUs in mixed precision and channels_last: tensor-core kernels load aligned "
        "pixels, and three channels of bf16 are 6 bytes.",
        price="Images and the first weights are copied in every forward pass.",
        failure="A network without a convolution over three channels stays as it is. cuDNN may pad "
        "by itself, and then the switch gains nothing.",
        source="NVIDIA, Convolutional Layers User's Guide, Channels In and Out",
    ),
)


def _master_weights(situation: Situation) -> Decision:
    if not situation.config.master_weights:
        return Decision(False)
    obstacle = _obstacle_to_master_weights(situation)
    return Decision(not obstacle, obstacle or "asked for")


def _obstacle_to_master_weights(situation: Situation) -> str:
    obstacles = {
        "precision 32 computes with the weights themselves": situation.chosen["precision"] == "32",
        "the processes would exchange no gradient before the last": situation.world_size > 1,
        "torch.compile casts the weights in its kernels": situation.chosen["compile"],
        "recomputed activations would not see the copies": (
            situation.config.activation_checkpointing
        ),
    }
    return next((reason for reason, holds in obstacles.items() if holds), "")


def _master_weights_trials(situation: Situation) -> Iterator[Trial]:
    if situation.on_cuda and not _obstacle_to_master_weights(situation):
        yield from turned("master_weights", "master weights")(situation)


MASTER_WEIGHTS = Switch(
    key="master_weights",
    name="master weights",
    numbers="same",
    choose=_master_weights,
    ablation=off_and_on("master_weights"),
    ablation_needs=("gpu",),
    dimension="master weights",
    trials=_master_weights_trials,
    card=Card(
        use="Mixed precision on a GPU, with many small layers: one operation casts all weights, "
        "where autocast launches one for each layer and direction.",
        price="All half-precision gradients are kept until the end of the backward pass: 2 bytes a "
        "weight. A step that is not recorded takes Python a little longer.",
        failure="With several processes, a compiled step or recomputed activations, the plan says "
        "why and does without.",
        source="Micikevicius et al., Mixed Precision Training, arXiv 1710.03740",
    ),
)

HALF_PRECISION = (PAD_STEM, MASTER_WEIGHTS)
