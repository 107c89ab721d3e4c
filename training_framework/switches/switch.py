"""What a switch is: one optimization or method, and all that the project knows about it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import nn

from training_framework.config import TrainConfig
from training_framework.data.facts import DatasetFacts
from training_framework.machine.hardware import Accelerator, Hardware

__all__ = [
    "Card",
    "Decision",
    "Network",
    "Numbers",
    "Situation",
    "Switch",
    "Trial",
    "as_asked",
    "off_and_on",
    "turned",
]

Numbers = Literal["same", "rounding", "different"]
"""What a switch does to results: the same bits, other rounding only, or other results."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What to know before using a switch; docs/switches.md shows all cards.

    Attributes:
        use: When it helps.
        price: What it costs.
        failure: When it does nothing, or harm.
        source: The paper or page it comes from.
    """

    use: str
    price: str
    failure: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the choice of a switch's value is based on.

    Attributes:
        config: The configuration.
        hardware: The machine.
        facts: Facts about the data set.
        accelerators: The devices that this machine's processes train on, by local rank; none on the
            CPU.
        world_size: Processes that train together.
        local_world_size: The number of these on this machine.
        total_steps: Optimizer steps of the run.
        stem: The network's stem, as planned.
        own_network: Whether the network is the user's own. Only for our own networks do we know
            that they are never differentiated twice.
        chosen: Values of the switches that come earlier in `SWITCHES`, by key.
    """

    config: TrainConfig
    hardware: Hardware
    facts: DatasetFacts
    accelerators: tuple[Accelerator, ...]
    world_size: int
    local_world_size: int
    total_steps: int
    stem: Literal["cifar", "imagenet"]
    own_network: bool = False
    chosen: Mapping[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether the run is not on the CPU."""
        return bool(self.accelerators)

    @property
    def on_cuda(self) -> bool:
        """Whether the run is on a CUDA (or ROCm) device."""
        return self.device == "cuda"

    @property
    def device(self) -> str:
        """PyTorch's type of the device."""
        return self.accelerators[0].kind if self.accelerators else "cpu"


class Decision(NamedTuple):
    """A value, and the reason in one line; no reason if there was nothing to decide."""

    value: Any
    reason: str = ""


class Trial(NamedTuple):
    """Something for `tune` to try: its name, and its settings."""

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Network:
    """What a change to a network may depend on.

    Attributes:
        chosen: Values of all switches, by key.
        image_size: Side in pixels of the square images.
        device_type: PyTorch's type of the device that the network is on.
    """

    chosen: Mapping[str, Any]
    image_size: int
    device_type: str


@dataclass(frozen=True, kw_only=True, eq=False)  # compared by identity, and hashable
class Switch:
    """One optimization or method of training.

    Attributes:
        key: Its key in TrainConfig and in the plan.
        name: Its name in tables.
        numbers: What it does to results.
        card: What to know before using it.
        choose: Chooses its value in a situation.
        change_network: Applies it to a network on its device, unless it is off; raises
            NativeKernelsError if it needs kernels that cannot be compiled here.
        set_up_process: Applies its value to this process, given the type of device.
        ablation: Settings with it off, and with it on; None leaves it out of `compare --ablate`.
        ablation_needs: What the machine must have to measure it on, as `needs` of an experiment.
        can_matter: Whether it can change anything for this configuration and data.
        dimension: What `tune` varies with it; switches of the same dimension exclude each other.
        trials: Values other than the chosen one that `tune` tries.
    """

    key: str
    name: str
    numbers: Numbers
    card: Card
    choose: Callable[[Situation], Decision]
    change_network: Callable[[nn.Module, Network], object] | None = None
    set_up_process: Callable[[Any, str], object] | None = None
    ablation: tuple[dict[str, Any], dict[str, Any]] | None = None
    ablation_needs: tuple[str, ...] = ()
    can_matter: Callable[[TrainConfig, DatasetFacts], bool] = lambda config, facts: True
    dimension: str = ""
    trials: Callable[[Situation], Iterator[Trial]] = lambda situation: iter(())

    @property
    def help(self) -> str:
        """Its text in `--help`."""
        return TrainConfig.model_fields[self.key].description or ""

    @property
    def is_left_to_the_plan(self) -> bool:
        """Whether the plan chooses its value unless one is given."""
        return bool(TrainConfig.model_fields[self.key].default == "auto")

    @property
    def flag(self) -> str:
        """Its flag on the command line."""
        return "--" + self.key.replace("_", "-")


def turned(key: str, name: str) -> Callable[[Situation], Iterator[Trial]]:
    """For `tune`: the other value of an on-off switch."""

    def trials(situation: Situation) -> Iterator[Trial]:
        on = situation.chosen[key]
        yield Trial(f"no {name}" if on else name, {key: not on})

    return trials


def off_and_on(key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """For `compare --ablate`: the settings of an on-off switch."""
    return {key: False}, {key: True}


def as_asked(key: str) -> Callable[[Situation], Decision]:
    """The choice of a switch that the configuration alone decides."""
    return lambda situation: Decision(getattr(situation.config, key))
