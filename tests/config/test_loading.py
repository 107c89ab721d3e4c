from pathlib import Path

import pytest

from training_framework.config import TrainConfig, config_to_yaml, load_config
from training_framework.config.inheritance import shipped_configs
from training_framework.errors import UserError

PUBLISHED = """\
data_root: tiny
img_size: 224
batch_size: 32
num_workers: 2
num_classes: 5
epochs: 1
lr: 0.01
momentum: 0.9
weight_decay: 0.0001
warmup_epochs: 0
max_epochs: 1
accelerator: cpu        # gpu, auto
devices: 1
strategy: auto          # ddp
precision: 32           # 16-mixed, bf16-mixed
sync_batchnorm: false
val_check_interval: 0.5
log_every_n_steps: 5
save_top_k: 1
"""


@pytest.mark.parametrize("first_line", ["", "extends: base.yaml\n"])
def test_the_published_file_loads_as_it_stands(tmp_path, first_line):
    (tmp_path / "base.yaml").write_text("seed: 3\n")
    (tmp_path / "tiny.yaml").write_text(first_line + PUBLISHED)
    config = load_config(tmp_path / "tiny.yaml", {"model": "resnet50"})
    assert (config.model, config.epochs, config.lr) == ("resnet50", 1, 0.01)
    assert (config.precision, config.val_check_interval) == ("32", 0.5)
    assert config.seed == (3 if first_line else 0)


def test_overrides_win_by_any_of_a_settings_names(tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    assert load_config(tmp_path / "mine.yaml", {"max_epochs": 5}).epochs == 5


def test_the_file_wins_over_the_base_of_a_resumed_run(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    config = load_config(tmp_path / "mine.yaml", base={"seed": 1, "epochs": 2})
    assert (config.seed, config.epochs) == (3, 2)


def test_resumption_inherits_neither_starting_weights_nor_an_early_stop():
    base = {"seed": 1, "weights": "start.pth", "stop_after_steps": 3}
    config = load_config(overrides={"resume": "last.ckpt"}, base=base)
    assert (config.seed, config.weights, config.stop_after_steps) == (1, None, None)
    assert load_config(base=base).stop_after_steps == 3
    config = load_config(overrides={"resume": "auto"}, base=base)
    assert (config.weights, config.stop_after_steps) == (Path("start.pth"), 3)


@pytest.mark.parametrize("value", [None, 5, True])
def test_what_to_resume_is_a_word_or_a_file(value):
    assert load_config().resume == "auto"
    assert load_config(overrides={"resume": "never"}).resume == "never"
    assert load_config(overrides={"resume": "a.ckpt"}).resume == Path("a.ckpt")
    with pytest.raises(UserError, match=r"resume: .* should be 'auto' or 'never'"):
        load_config(overrides={"resume": value})


def test_written_configuration_loads_as_the_same_one(tmp_path):
    config = TrainConfig(
        scheduler="multi_step", milestones=(3.0, 5.5), precision=32, name="x", data_root="d"
    )
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_shipped_file_is_valid(name):
    assert isinstance(load_config(name), TrainConfig)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("epoch: 3", {}, r"mine.yaml: unknown key 'epoch'; did you mean 'epochs'"),
        ("zzz: 3", {}, r"mine.yaml: unknown key 'zzz'; .*--help"),
        (
            "epochs: three",
            {},
            r"mine.yaml: epochs: 'three' should be a valid number; epochs",
        ),
        ("lr: fast", {}, r"mine.yaml: lr: 'fast' should be a valid number or 'auto'"),
        ("optimizer: sdg", {}, r"mine.yaml: optimizer: 'sdg' should be 'sgd'"),
        ("epochs: 3", {"epochs": -1}, r"flags: epochs: -1 should be greater than 0"),
        ("epochs: 3", {"warmup_epochs": 4}, r"mine.yaml, flags: warmup_epochs 4 is longer"),
        ("milestones: [x]", {}, r"mine.yaml: milestones: \['x'\] should be a valid number"),
    ],
)
def test_errors_name_source_key_value_and_cure(tmp_path, text, overrides, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_config(tmp_path / "mine.yaml", overrides, source="flags")
    assert "\n" not in str(caught.value)
