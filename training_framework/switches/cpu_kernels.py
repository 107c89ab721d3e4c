"""Switches for what PyTorch does slowly on a CPU: convolutions, norms, memory."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from training_framework.config.architectures import MODELS
from training_framework.errors import UserError
from training_framework.kernels.small_maps import keep_small_maps_from_compiler
from training_framework.kernels.winograd_convolution import SMALLEST_MAP
from training_framework.machine.memory import keep_freed_memory
from training_framework.models import (
    fuse_norms,
    use_small_map_convolutions,
    use_winograd_convolutions,
)
from training_framework.switches.switch import (
    Card,
    Decision,
    Network,
    Situation,
    Switch,
    Trial,
    off_and_on,
    turned,
)

__all__ = ["CPU_KERNELS", "bf16_products_pay"]

# Up to this side in pixels, most of a 3x3 convolution's products are with its padding.
LARGEST_SMALL_MAP = 2


def _on_cpu(
    trials: Callable[[Situation], Iterator[Trial]], *, compiler: bool = False
) -> Callable[[Situation], Iterator[Trial]]:
    """The trials, if the switch can have an effect at all."""

    def where_it_acts(situation: Situation) -> Iterator[Trial]:
        if not situation.on_gpu and (situation.hardware.cpp_compiler or not compiler):
            yield from trials(situation)

    return where_it_acts


def _small_map_convolutions(situation: Situation) -> Decision:
    wanted = situation.config.small_map_convolutions
    if wanted is True and situation.on_gpu:
        return Decision(False, "only works on a CPU")
    if wanted != "auto":
        return Decision(wanted, "asked for")
    last_map = situation.facts.image_size // (32 if situation.stem == "imagenet" else 8)
    in_fp32 = not situation.on_gpu and situation.chosen["precision"] == "32"
    if situation.own_network or not in_fp32 or last_map > LARGEST_SMALL_MAP:
        return Decision(False)
    return Decision(True, f"the last maps are {last_map} px: mostly padding")


def _use_small_map_convolutions(model: nn.Module, network: Network) -> None:
    use_small_map_convolutions(model, network.image_size)
    if network.chosen["compile"]:
        keep_small_maps_from_compiler()


SMALL_MAP_CONVOLUTIONS = Switch(
    key="small_map_convolutions",
    name="small-map convs",
    numbers="rounding",
    choose=_small_map_convolutions,
    change_network=_use_small_map_convolutions,
    ablation=off_and_on("small_map_convolutions"),
    dimension="small-map convolutions",
    trials=_on_cpu(turned("small_map_convolutions", "small-map convolutions")),
    card=Card(
        use="A CPU in fp32 and maps of one or two pixels: small images with the ImageNet stem.",
        price="The network can be differentiated only once.",
        failure="On other devices, and for larger maps, the ordinary convolution runs.",
        source="Measured here: docs/experiments.md",
    ),
)


def _native_kernels(situation: Situation, key: str, gain: str) -> Decision:
    """Whether kernels that are compiled here take over a part of the work.

    Raises:
        UserError: They are asked for, and there is no compiler.
    """
    wanted, hardware = getattr(situation.config, key), situation.hardware
    in_fp32 = not situation.on_gpu and situation.chosen["precision"] == "32"
    if wanted is True and in_fp32 and not hardware.cpp_compiler:
        raise UserError(
            f"{key}: {hardware.cpp_compiler_fault}",
            f"install a C++ compiler (g++), or set {key} to false",
        )
    if wanted != "auto":
        useless = wanted and not in_fp32
        why = "only works on a CPU in fp32" if useless else "asked for"
        return Decision(wanted and in_fp32, why)
    if situation.own_network or not in_fp32 or not situation.chosen["channels_last"]:
        return Decision(False)
    if situation.config.compile is True:
        return Decision(False)
    if "avx512" not in hardware.instruction_sets:
        return Decision(False, "measured to pay only on CPUs with AVX-512")
    if not hardware.cpp_compiler:
        return Decision(False, f"{gain}, but {hardware.cpp_compiler_fault}")
    return Decision(True, f"{gain}; kernels for this CPU, compiled once")


def _first_map(situation: Situation) -> int:
    return situation.facts.image_size // (4 if situation.stem == "imagenet" else 1)


def _winograd_convolutions(situation: Situation) -> Decision:
    if situation.config.winograd_convolutions == "auto" and _first_map(situation) < SMALLEST_MAP:
        return Decision(False)
    gain = "2.25 to 4 times fewer multiplications"
    return _native_kernels(situation, "winograd_convolutions", gain)


def _use_winograd_convolutions(model: nn.Module, network: Network) -> None:
    in_bf16 = network.chosen["bf16_products"]
    use_winograd_convolutions(model, network.image_size, bf16_products=in_bf16)


WINOGRAD_CONVOLUTIONS = Switch(
    key="winograd_convolutions",
    name="winograd convs",
    numbers="rounding",
    choose=_winograd_convolutions,
    change_network=_use_winograd_convolutions,
    ablation=off_and_on("winograd_convolutions"),
    dimension="winograd convolutions",
    trials=_on_cpu(turned("winograd_convolutions", "winograd convolutions"), compiler=True),
    card=Card(
        use="A CPU with AVX-512 in fp32 and channels_last: 3x3 convolutions take 2.25 to 4 times "
        "fewer multiplications.",
        price="Kernels are compiled once on each machine: some seconds, and a C++ compiler. Errors "
        "are up to 4 millionths of the largest value instead of 3. The network can be "
        "differentiated only once.",
        failure="On other devices and in other precisions the ordinary convolution runs. "
        "Grouped convolutions are not changed.",
        source="Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, "
        "arXiv 1509.09308",
    ),
)


def _bf16_products(situation: Situation) -> Decision:
    wanted, hardware = situation.config.bf16_products, situation.hardware
    if not situation.chosen["winograd_convolutions"]:
        asked = wanted is True
        return Decision(False, "only works in Winograd's convolutions" if asked else "")
    fast = "avx512_bf16" in hardware.instruction_sets and hardware.cpu_bf16_pays
    if wanted != "auto":
        slow = "" if fast or not wanted else "; this CPU is slow at it"
        return Decision(wanted, f"asked for{slow}")
    if not fast or situation.config.precision != "auto":  # who asks for fp32 gets fp32
        return Decision(False)
    return Decision(True, "the CPU computes bf16 itself; all else stays in fp32")


BF16_PRODUCTS = Switch(
    key="bf16_products",
    name="bf16 products",
    numbers="different",
    choose=_bf16_products,
    ablation=off_and_on("bf16_products"),
    ablation_needs=("bf16",),
    dimension="winograd convolutions",
    trials=_on_cpu(turned("bf16_products", "bf16 products"), compiler=True),
    card=Card(
        use="A CPU with avx512_bf16 that is faster than in fp32: the products inside Winograd's "
        "convolutions take half the time and half the memory traffic.",
        price="The transformed tiles are rounded to bf16, which adds an error of 1.2% (root mean "
        "square) to a convolution of stride 1; one of bf16 tensors has 0.3%. Activations, norms, "
        "sums and weights stay in fp32.",
        failure="Without Winograd's convolutions it does nothing; without avx512_bf16 it is "
        "emulated, and slow.",
        source="Measured here: docs/experiments.md",
    ),
)


def bf16_products_pay(situation: Situation) -> bool:
    """Whether precision 32 with bf16 products is faster than bf16 throughout.

    It is for networks of 3x3 convolutions. In a bottleneck, half of the products are in 1x1
    convolutions, which only `precision: bf16-mixed` computes in bf16.
    """
    config = situation.config
    # Precision and layout are chosen later; Winograd's own choice says where it would then be on.
    in_fp32 = dataclasses.replace(
        situation,
        config=config.model_copy(update={"winograd_convolutions": "auto"}),
        chosen={"precision": "32", "channels_last": config.channels_last is not False},
    )
    return (
        config.bf16_products is not False
        and config.winograd_convolutions is not False
        and MODELS[config.model].block == "basic"
        and "avx512_bf16" in situation.hardware.instruction_sets
        and bool(_winograd_convolutions(in_fp32).value)
    )


def _fused_norms(situation: Situation) -> Decision:
    if situation.chosen["sync_batchnorm"]:
        asked = situation.config.fused_norms is True
        return Decision(False, "batch norm is synchronized between processes" if asked else "")
    return _native_kernels(situation, "fused_norms", "fewer passes over memory")


def _fuse_norms(model: nn.Module, network: Network) -> None:
    fuse_norms(model)


FUSED_NORMS = Switch(
    key="fused_norms",
    name="fused norms",
    numbers="rounding",
    choose=_fused_norms,
    change_network=_fuse_norms,
    ablation=off_and_on("fused_norms"),
    dimension="fused norms",
    trials=_on_cpu(turned("fused_norms", "fused norms"), compiler=True),
    card=Card(
        use="A CPU with AVX-512 in fp32 and channels_last: batch norm, shortcut and ReLU, GELU or "
        "SiLU become one pass over memory.",
        price="Kernels are compiled once on each machine: some seconds, and a C++ compiler. The "
        "network can be differentiated only once.",
        failure="In other precisions and in evaluation PyTorch's operators run. It is off where "
        "batch norm is synchronized between processes.",
        source="Measured here: docs/experiments.md",
    ),
)


def _keep_memory(situation: Situation) -> Decision:
    wanted = situation.config.keep_memory
    if wanted is True and not situation.hardware.glibc:
        return Decision(False, "only glibc's malloc can keep memory")
    if wanted != "auto":
        return Decision(wanted, "asked for")
    if situation.on_gpu or not situation.hardware.glibc:
        return Decision(False)
    return Decision(True, "no new pages for each step's activations")


def _memory_trials(situation: Situation) -> Iterator[Trial]:
    if situation.hardware.glibc:
        yield from turned("keep_memory", "kept memory")(situation)


def _keep_freed_memory(value: Any, device_type: str) -> None:
    if value:
        keep_freed_memory()


KEEP_MEMORY = Switch(
    key="keep_memory",
    name="kept memory",
    numbers="same",
    choose=_keep_memory,
    set_up_process=_keep_freed_memory,
    ablation=off_and_on("keep_memory"),
    dimension="kept memory",
    trials=_on_cpu(_memory_trials),
    card=Card(
        use="Training on a CPU under Linux: the pages of a step's activations serve the next step.",
        price="The process keeps its largest amount of memory until it ends.",
        failure="Only glibc's malloc has this option; elsewhere the switch does nothing.",
        source="mallopt(3), Linux manual pages",
    ),
)

CPU_KERNELS = (
    SMALL_MAP_CONVOLUTIONS,
    WINOGRAD_CONVOLUTIONS,
    BF16_PRODUCTS,
    FUSED_NORMS,
    KEEP_MEMORY,
)
