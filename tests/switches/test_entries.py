import dataclasses
import typing
from pathlib import Path

import pytest
import yaml

import training_framework
from training_framework.config import TrainConfig
from training_framework.config.schema import TRAJECTORY_FREE_KEYS, sections
from training_framework.plan import TrainPlan
from training_framework.switches import SWITCHES, Card
from training_framework.switches.switch import Numbers

PRESETS = sorted((Path(training_framework.__file__).parent / "config/presets").glob("*.yaml"))
# Settings of the section `machine` that say where a run takes place.
PLACES = {"accelerator", "devices", "strategy"}


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.key)
def test_an_entry_is_complete(switch):
    assert switch.help
    assert switch.numbers in typing.get_args(Numbers)
    for field in dataclasses.fields(Card):
        text = getattr(switch.card, field.name)
        assert len(text) >= 5 and text == text.strip(), (switch.key, field.name)


def test_every_switch_has_a_key_and_a_name_of_its_own():
    keys, names = [s.key for s in SWITCHES], [s.name for s in SWITCHES]
    assert len({*keys}) == len(keys) and len({*names}) == len(names)
    assert set(keys) <= set(TrainConfig.model_fields)


def test_every_setting_of_the_machine_is_a_switch():
    assert set(sections()["machine"]) - PLACES <= {switch.key for switch in SWITCHES}


def test_settings_that_may_differ_between_a_run_and_its_resumption_leave_the_numbers_alone():
    free = {s.key: s.numbers for s in SWITCHES if s.key in TRAJECTORY_FREE_KEYS}
    # It acts only where memory is full, and the run then says so.
    assert free.pop("auto_micro_batch") == "different"
    assert set(free.values()) == {"same"}


def test_presets_set_switches_and_the_batch():
    assert PRESETS
    for preset in PRESETS:
        settings = yaml.safe_load(preset.read_text(encoding="utf-8"))
        allowed = {switch.key for switch in SWITCHES} | PLACES | {"batch_size"}
        assert set(settings) <= allowed, preset.name


def test_what_ablation_turns_on_and_off_are_valid_settings_of_the_switch():
    for switch in SWITCHES:
        for settings in switch.ablation or ():
            assert switch.key in settings
            TrainConfig(**settings)


def test_every_switch_of_the_package_is_a_typed_field_of_the_plan():
    fields = {field.name for field in dataclasses.fields(TrainPlan)}
    assert {switch.key for switch in SWITCHES} <= fields
