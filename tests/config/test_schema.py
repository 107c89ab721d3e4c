import pytest
from pydantic import ValidationError

from training_framework.config import TrainConfig
from training_framework.config.schema import TRAJECTORY_FREE_KEYS, sections


def test_configuration_is_frozen():
    config = TrainConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.lr = 0.1


def test_precision_reads_a_plain_32_as_yaml_writes_it():
    assert TrainConfig(precision=32).precision == "32"
    assert TrainConfig(precision="32-true").precision == "32"


@pytest.mark.parametrize("value", [True, 16, "64", "fp16", None])
def test_precision_refuses_what_it_does_not_know(value):
    with pytest.raises(ValidationError):
        TrainConfig(precision=value)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0.0},
        {"epochs": True},
        {"epochs": "3"},
        {"epochs": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"momentum": 1.0},
        {"label_smoothing": -0.1},
        {"channels_last": "yes"},
        {"compile": 1},
        {"name": "../elsewhere"},
        {"unknown": 1},
    ],
)
def test_wrong_types_and_ranges_are_refused(settings):
    with pytest.raises(ValidationError):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"warmup_epochs": 1.0, "warmup_steps": 5}, "warmup_steps"),
        ({"warmup_epochs": 3.0, "epochs": 2}, "warmup_epochs"),
        ({"scheduler": "multi_step"}, "milestones"),
        ({"milestones": (1.0,), "scheduler": "cosine"}, "milestones"),
        ({"milestones": (3.0, 1.0), "scheduler": "multi_step"}, "milestones"),
        ({"nesterov": True, "optimizer": "adamw"}, "nesterov"),
        ({"nesterov": True, "momentum": 0.0}, "momentum"),
        ({"share_early_weights": True, "model": "resnet50"}, "share_early_weights"),
        ({"blur_pool": True, "model": "wrn_16_4"}, "wrn_16_4 has no blur_pool"),
        ({"deep_stem": True, "whitening": True}, "whitening needs a single first convolution"),
        ({"model": "resnet50d", "whitening": True}, "deep_stem makes three"),
        ({"model": "resnet8_fast", "zero_init_last_norm": True}, "freeze_norm_scales leaves"),
        ({"model": "wrn_16_4", "zero_init_last_norm": True}, "zero_init_last_norm: a relu follows"),
        ({"optimizer": "muon", "muon_rest": "adamw", "nesterov": True}, "optimizer is adamw"),
        ({"muon_rest_lr": 0.1}, "muon_rest_lr is given but optimizer is sgd"),
        ({"compile": False, "compile_mode": "default"}, "compile_mode"),
        ({"resume": "a.ckpt", "weights": "b.pth"}, "weights"),
        ({"data": "digits", "data_root": "somewhere"}, "data_root"),
    ],
)
def test_contradictions_name_the_setting(settings, named):
    with pytest.raises(ValidationError, match=named):
        TrainConfig(**settings)


def test_every_key_has_a_section_and_a_description():
    in_sections = [key for keys in sections().values() for key in keys]
    assert in_sections == list(TrainConfig.model_fields)
    assert all(field.description for field in TrainConfig.model_fields.values())


def test_keys_that_do_not_change_the_trajectory_exist():
    assert set(TrainConfig.model_fields) >= TRAJECTORY_FREE_KEYS
