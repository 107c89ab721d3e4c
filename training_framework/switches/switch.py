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
    """What the choice of a switch's value follows from.

    Attributes:
        config: What is asked for.
        hardware: The machine.
        facts: Of the data set.
        accelerators: Those that the processes of this machine train on, by local rank; none on
            the CPU.
        world_size: Processes that train together.
        local_world_size: Those of them on this machine.
        total_steps: Optimizer steps of the run.
        stem: Of the network, as planned.
        own_network: Whether the user brings the network. Of our own networks alone do we know
            that nothing but the gradient of a step is wanted of them.
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
    """A value, and in one line why; no reason where there was nothing to decide."""

    value: Any
    reason: str = ""


class Trial(NamedTuple):
    """Something for `tune` to try: what to call it, and the settings that make it."""

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Network:
    """What a change to a network may follow from.

    Attributes:
        chosen: Values of all switches, by key.
        image_size: Side in pixels of the square images.
        device_type: PyTorch's type of the device that the network is on.
    """

    chosen: Mapping[str, Any]
    image_size: int
    device_type: str


@dataclass(frozen=True, kw_only=True, eq=False)  # an entry is itself alone, and hashable
class Switch:
    """One optimization or method of training.

    Attributes:
        key: Of TrainConfig, and of the plan.
        name: In tables.
        numbers: What it does to results.
        card: What to know before using it.
        choose: Its value, from the situation.
        change_network: Applies it to a network on its device, where it is not off; raises
            NativeKernelsError where it needs kernels that cannot be compiled here.
        set_up_process: Applies its value to this process, which computes on that type of device.
        ablation: Settings with it off, and with it on; None leaves it out of `compare --ablate`.
        ablation_needs: What the machine must have to measure it on, as `needs` of an experiment.
        can_matter: Whether it can change anything for this configuration and data.
        dimension: What `tune` varies with it; switches with one dimension exclude each other.
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
        """What `--help` says of it."""
        return TrainConfig.model_fields[self.key].description or ""

    @property
    def is_left_to_the_plan(self) -> bool:
        """Whether it is chosen unless somebody asks for a value."""
        return bool(TrainConfig.model_fields[self.key].default == "auto")

    @property
    def flag(self) -> str:
        """On the command line."""
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
