import pytest

from training_framework.config.inheritance import read_config_file, shipped_configs
from training_framework.errors import UserError


def values(path):
    return {key: setting.value for key, setting in read_config_file(path).items()}


def test_extending_file_wins_over_a_chain_of_bases(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1.0\nepochs: 1\nseed: 1\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nepochs: 2\nseed: 2\n")
    (tmp_path / "c.yaml").write_text("extends: b.yaml\nseed: 3\n")
    assert values(tmp_path / "c.yaml") == {"lr": 1.0, "epochs": 2, "seed": 3}


def test_bases_are_relative_to_the_file_that_names_them(tmp_path):
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "deep.yaml").write_text("lr: 0.5\n")
    (tmp_path / "bases" / "base.yaml").write_text("extends: deep.yaml\n")
    (tmp_path / "mine.yaml").write_text("extends: bases/base.yaml\n")
    assert values(tmp_path / "mine.yaml") == {"lr": 0.5}


def test_later_bases_of_a_list_win(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1.0\nseed: 1\n")
    (tmp_path / "b.yaml").write_text("lr: 2.0\n")
    (tmp_path / "c.yaml").write_text("extends: [a.yaml, b.yaml]\n")
    assert values(tmp_path / "c.yaml") == {"lr": 2.0, "seed": 1}


def test_an_alias_in_the_extending_file_overrides_the_base(tmp_path):
    (tmp_path / "base.yaml").write_text("epochs: 90\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nmax_epochs: 3\n")
    assert values(tmp_path / "mine.yaml") == {"epochs": 3}


def test_two_names_of_one_setting_may_agree_in_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 3\nmax_epochs: 3\n")
    assert values(tmp_path / "mine.yaml") == {"epochs": 3}


def test_two_names_of_one_setting_that_contradict_each_other_are_both_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 3\nmax_epochs: 4\n")
    with pytest.raises(UserError, match=r"mine.yaml: epochs is 3 but max_epochs is 4"):
        values(tmp_path / "mine.yaml")


def test_a_cycle_is_shown_link_by_link(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(UserError, match=r"a.yaml -> b.yaml -> a.yaml"):
        values(tmp_path / "a.yaml")


def test_a_missing_base_names_the_file_that_wants_it(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: gone.yaml\n")
    with pytest.raises(UserError, match=r"mine.yaml: extends: .*gone.yaml: no such"):
        values(tmp_path / "mine.yaml")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "+1e-3", ".1e-2"])
def test_numbers_with_an_exponent_are_numbers(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(f"lr: {text}\n")
    assert values(tmp_path / "mine.yaml") == {"lr": 0.001}


def test_a_key_given_twice_is_an_error(tmp_path):
    (tmp_path / "mine.yaml").write_text("lr: 1.0\nseed: 1\nlr: 2.0\n")
    with pytest.raises(UserError, match=r"line 3.*'lr' is given twice"):
        values(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "lr: [1",
        "- a\n- b",
        "just text",
        "lr: 1\n\tseed: 2",
        "1: 2",
        "extends: 3",
        "extends: [1]",
        "lr: !!python/object/apply:os.getcwd []",
        "lr: &a [*a]\nx: *b",
    ],
)
def test_what_is_no_configuration_is_one_line_that_names_the_file(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml") as caught:
        values(tmp_path / "mine.yaml")
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00lr")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        values(tmp_path / "mine.yaml")


def test_an_empty_file_sets_nothing(tmp_path):
    (tmp_path / "mine.yaml").write_text("# nothing yet\n")
    assert values(tmp_path / "mine.yaml") == {}


@pytest.mark.parametrize("preset", ["gpu-optimized", "cpu-optimized", "memory-efficient"])
def test_presets_can_be_extended_by_name(tmp_path, preset):
    (tmp_path / "mine.yaml").write_text(f"extends: {preset}\nseed: 7\n")
    assert values(tmp_path / "mine.yaml") == {**values(preset), "seed": 7}
    assert preset in shipped_configs()
