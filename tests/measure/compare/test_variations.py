import pytest

from training_framework.config.inheritance import canonical_settings
from training_framework.config.loading import build_config
from training_framework.errors import UserError
from training_framework.measure.compare.variations import ALL_OFF, AS_PLANNED, ablation, variation
from training_framework.train import plan_for

SETTINGS = {
    "data": "synthetic", "img_size": 32, "model": "resnet10", "accelerator": "cpu",
    "precision": "bf16-mixed",
}  # fmt: skip
BASE = canonical_settings(SETTINGS, "test")


def planned_ablation(**settings):
    base = canonical_settings({**SETTINGS, **settings}, "test")
    config = build_config(base)
    plan, _, facts = plan_for(config)
    return ablation(base, plan, facts)


def test_one_key_gives_a_variant_for_each_value():
    experiment = variation(BASE, [("batch_size", [16, 32, 64])])
    assert [experiment.config_of(v).batch_size for v in experiment.variants] == [16, 32, 64]
    assert experiment.variants[0].name == "batch_size=16"
    assert experiment.name == "vary-batch-size"
    assert experiment.may_differ == ("images_per_step",)


def test_two_keys_give_all_combinations():
    experiment = variation(BASE, [("use_amp", [False, True]), ("channels_last", [True, False])])
    made = [experiment.config_of(v) for v in experiment.variants]
    assert [(c.precision, c.channels_last) for c in made] == [
        ("32", True), ("32", False), ("mixed", True), ("mixed", False),
    ]  # fmt: skip
    assert experiment.may_differ == ()


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ([("batch_sise", [1, 2])], r"unknown key 'batch_sise'.*batch_size"),
        ([("batch_size", [16])], r"give two or more"),
        ([("batch_size", [16, 16])], r"or some are equal"),
        ([("lr", [0.1, 0.2]), ("learning_rate", [0.1, 0.3])], r"a key is given twice"),
        ([("batch_size", [16, 0])], r"batch_size=0: overrides: batch_size: 0 should be"),
    ],
)
def test_what_cannot_be_varied_is_refused(axes, message):
    with pytest.raises(UserError, match=message):
        variation(BASE, axes)


def test_every_row_of_an_ablation_is_one_switch_from_what_it_is_compared_with():
    experiment = planned_ablation()
    configs = {v.name: experiment.config_of(v).model_dump() for v in experiment.variants}
    rows = [v for v in experiment.variants if v.name not in (ALL_OFF, AS_PLANNED)]
    assert {v.against for v in rows} == {ALL_OFF, AS_PLANNED}
    for variant in rows:
        ours, theirs = configs[variant.name], configs[variant.against]
        differing = {key for key in ours if ours[key] != theirs[key]}
        assert len(differing - {"compile_mode"}) == 1, variant.name


def test_each_switch_is_turned_round_from_what_the_plan_made_of_it():
    names = {variant.name for variant in planned_ablation().variants}
    assert {"without mixed precision", "without channels_last", "with compile"} <= names
    assert {"only mixed precision", "only compile", "only checkpointing"} <= names
    assert "with mixed precision" in {v.name for v in planned_ablation(precision="32").variants}


def test_switches_that_do_not_apply_are_left_out():
    names = {variant.name for variant in planned_ablation(model="resnet50").variants}
    assert not any("shared weights" in name or "resident data" in name for name in names)
