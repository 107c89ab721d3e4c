"""Chooses the values of all switches for a run, one after the other, and applies them."""

import dataclasses
import warnings
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from training_framework.errors import UserError
from training_framework.kernels import NativeKernelsError
from training_framework.switches.entries import SWITCHES
from training_framework.switches.switch import Network, Situation

__all__ = ["Choice", "Choices", "Chosen", "change_network", "choose_all", "set_up_process"]


class Choice(NamedTuple):
    """One decision: its name, its value, and why."""

    name: str
    value: str
    reason: str


class Choices(list[Choice]):
    """The choices in the order in which they were made."""

    def note(self, name: str, value: Any, reason: str) -> None:
        """Add a choice; True and False become on and off."""
        readable = ("on" if value else "off") if isinstance(value, bool) else value
        self.append(Choice(name, str(readable), reason))


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What was chosen.

    Attributes:
        values: Of every switch, by key.
        choices: Decisions with their reasons, for people.
    """

    values: Mapping[str, Any]
    choices: tuple[Choice, ...]


def choose_all(situation: Situation) -> Chosen:
    """Choose every switch's value, in the order of `SWITCHES`.

    Raises:
        UserError: A setting cannot be used on this machine.
    """
    values: dict[str, Any] = {}
    choices = Choices()
    for switch in SWITCHES:
        decision = switch.choose(dataclasses.replace(situation, chosen=values))
        values[switch.key] = decision.value
        if decision.reason:
            choices.note(switch.key, decision.value, decision.reason)
    return Chosen(values=values, choices=tuple(choices))


def set_up_process(values: Mapping[str, Any], device_type: str) -> None:
    """Apply the chosen values to this process: threads, memory, determinism."""
    for switch in SWITCHES:
        if switch.set_up_process is not None:
            switch.set_up_process(values[switch.key], device_type)


def change_network(
    model: nn.Module,
    values: Mapping[str, Any],
    *,
    image_size: int,
    device_type: str,
    asked_for: Container[str],
) -> None:
    """Change a network on its device as chosen; its parameters keep their names.

    Args:
        model: It is changed in place.
        values: Of every switch, by key.
        image_size: Side in pixels of the square images.
        device_type: PyTorch's type of the device that the network is on.
        asked_for: Settings that can be left to the plan, but were given. The others do not warn if
            they find nothing to change, as in a very narrow network.

    Raises:
        UserError: Kernels that were chosen cannot be compiled here.
    """
    network = Network(chosen=values, image_size=image_size, device_type=device_type)
    for switch in SWITCHES:
        if switch.change_network is None or not values[switch.key]:
            continue
        try:
            with warnings.catch_warnings():
                if switch.is_left_to_the_plan and switch.key not in asked_for:
                    warnings.filterwarnings("ignore", message=".*nothing changed")
                switch.change_network(model, network)
        except NativeKernelsError as error:
            cure = f"install a C++ compiler (g++), or set {switch.key} to false"
            raise UserError(f"{switch.key}: {error}", cure) from None
