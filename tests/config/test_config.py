import pytest

from training_framework.config import TrainConfig
from training_framework.config.config import Config
from training_framework.errors import UserError


def test_upper_case_names_map_one_to_one():
    Config.BATCH_SIZE = 512
    Config.LEARNING_RATE = 0.001
    Config.USE_AMP = True
    Config.USE_TORCH_COMPILE = True
    Config.OPTIMIZER = "adamw"
    Config.SCHEDULER = "cosine"
    Config.EPOCHS = 3
    Config.NUM_WORKERS = 2
    Config.GRAD_CLIP_VAL = 1.0
    assert Config.to_train_config() == TrainConfig(
        batch_size=512,
        lr=0.001,
        precision="mixed",
        compile=True,
        optimizer="adamw",
        scheduler="cosine",
        epochs=3,
        num_workers=2,
        grad_clip_val=1.0,
    )


@pytest.mark.parametrize("key", sorted(TrainConfig.model_fields))
def test_every_key_can_be_read_in_upper_case(key):
    assert getattr(Config, key.upper()) == TrainConfig.model_fields[key].default
    assert key.upper() in dir(Config)


def test_a_name_that_does_not_exist_is_an_error():
    with pytest.raises(UserError, match=r"Config.BATCHSIZE: .*did you mean 'BATCH_SIZE'"):
        Config.BATCHSIZE = 3
    with pytest.raises(UserError, match=r"Config.EPOCH: no such setting"):
        _ = Config.EPOCH


@pytest.mark.parametrize(
    ("name", "value"),
    [("BATCH_SIZE", "large"), ("BATCH_SIZE", 2.5), ("USE_AMP", "yes"), ("LR", -1), ("SEED", None)],
)
def test_a_value_of_the_wrong_type_is_an_error_that_leaves_the_old_one(name, value):
    before = getattr(Config, name)
    with pytest.raises(UserError, match=f"Config.{name}"):
        setattr(Config, name, value)
    assert getattr(Config, name) == before


def test_settings_that_belong_together_may_come_one_after_the_other():
    Config.SCHEDULER = "multi_step"
    with pytest.raises(UserError, match="milestones"):
        Config.to_train_config()
    Config.MILESTONES = [1, 2]
    assert Config.to_train_config().milestones == (1.0, 2.0)


def test_subclasses_keep_their_settings_to_themselves():
    Config.SEED = 5

    class Mine(Config):
        BATCH_SIZE = 32

    class Broken(Config):
        pass

    Broken.BATCH_SIZE = 16
    assert Mine.to_train_config() == TrainConfig(seed=5, batch_size=32)
    assert Config.to_train_config() == TrainConfig(seed=5)
    with pytest.raises(UserError, match="BATCHES"):
        type("Wrong", (Config,), {"BATCHES": 3})


def test_use_amp_off_is_full_precision():
    Config.USE_AMP = False
    assert Config.to_train_config().precision == "32"
    assert Config.USE_AMP is False
