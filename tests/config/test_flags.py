import argparse

import pytest

from training_framework.config.flags import add_config_flags, given_settings


def given(arguments, keys=None):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_config_flags(parser, keys)
    return given_settings(parser.parse_args(arguments))


def test_only_what_was_given_is_a_setting():
    assert given([]) == {}
    assert given(["--batch-size", "3", "--max-epochs", "2"]) == {"batch_size": 3, "max_epochs": 2}


def test_a_command_may_take_a_few_keys_alone():
    assert given(["--workers", "2"], ["num_workers"]) == {"workers": 2}
    with pytest.raises(SystemExit):
        given(["--lr", "1"], ["num_workers"])


@pytest.mark.parametrize("flag", ["compile", "channels-last", "use-amp", "sync-batchnorm"])
def test_a_yes_or_no_may_stand_alone(flag):
    assert list(given([f"--{flag}"]).values()) == [True]
    assert list(given([f"--{flag}", "false"]).values()) == [False]


@pytest.mark.parametrize("flag", ["lr", "name", "data-root", "epochs", "precision"])
def test_anything_else_needs_a_value(flag):
    with pytest.raises(argparse.ArgumentError, match="expected one argument"):
        given([f"--{flag}"])


def test_text_that_is_no_yaml_stays_text():
    for text in ("[", "[" * 5000, "!!python/name:os.system", "2021-13-45"):
        assert given(["--lr", text]) == {"lr": text}
