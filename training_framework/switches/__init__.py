"""One entry a switch: how it is chosen and applied, what `tune` tries, and its card."""

from training_framework.switches.choosing import (
    Choice,
    Choices,
    Chosen,
    change_network,
    choose_all,
    set_up_process,
)
from training_framework.switches.entries import SWITCHES
from training_framework.switches.switch import Card, Decision, Network, Situation, Switch, Trial

__all__ = [
    "SWITCHES",
    "Card",
    "Choice",
    "Choices",
    "Chosen",
    "Decision",
    "Network",
    "Situation",
    "Switch",
    "Trial",
    "change_network",
    "choose_all",
    "set_up_process",
]
