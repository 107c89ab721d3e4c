"""Build a TrainConfig from YAML files and overrides; errors name their source in one line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from training_framework.config.inheritance import Setting, canonical_settings, read_config_file
from training_framework.config.names import nearest
from training_framework.config.schema import TrainConfig
from training_framework.errors import UserError, shown

__all__ = [
    "build_config",
    "check_value",
    "config_to_dict",
    "config_to_yaml",
    "load_config",
    "names_checkpoint",
    "settings_to_yaml",
]


def load_config(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    base: Mapping[str, Any] | None = None,
    source: str = "overrides",
) -> TrainConfig:
    """Build a configuration from a file and overrides.

    Args:
        path: YAML file, or the name of a shipped one; None for the defaults alone.
        overrides: Settings that replace the file's, by any of their names.
        base: Settings that file and overrides replace: those of the checkpoint to resume from.
            When a run resumes, its `weights` and `stop_after_steps` are dropped: both are past.
        source: What error messages call the overrides.

    Raises:
        UserError: A file, key or value is wrong. It names the file or `source`, key and value.
    """
    given = {} if path is None else read_config_file(path)
    given.update(canonical_settings(overrides or {}, source))
    inherited = canonical_settings(base or {}, "the checkpoint's configuration")
    if "resume" in given and names_checkpoint(given["resume"].value):
        for key in ("weights", "stop_after_steps"):
            inherited.pop(key, None)
    return build_config({**inherited, **given})


def names_checkpoint(resume: object) -> bool:
    """Whether a value of `resume` is a file name."""
    return resume not in ("auto", "never", None)


def build_config(settings: Mapping[str, Setting]) -> TrainConfig:
    """Validate settings, each given with its source.

    Raises:
        UserError: The first wrong setting, with its source, value and cure.
    """
    for key, setting in settings.items():
        if key not in TrainConfig.model_fields:
            raise UserError(f"{setting.source}: unknown key {shown(key)}", nearest(key[:100]))
    values = {key: _natural(key, setting.value) for key, setting in settings.items()}
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        raise _user_error(error, settings) from None


def check_value(key: str, setting: Setting) -> None:
    """Validate one setting by itself. Contradictions are ignored: the others may still change.

    Raises:
        UserError: The value has the wrong type or is out of range.
    """
    try:
        TrainConfig(**{key: _natural(key, setting.value)})
    except ValidationError as error:
        if error.errors()[0]["loc"]:
            raise _user_error(error, {key: setting}) from None


def _natural(key: str, value: Any) -> Any:
    """The value as TrainConfig expects it: YAML has lists but no tuples."""
    if key in ("milestones", "progressive_resolution"):
        return _as_tuples(value)
    return value


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _user_error(error: ValidationError, settings: Mapping[str, Setting]) -> UserError:
    first = error.errors()[0]
    if not first["loc"]:  # a contradiction between settings, which brings its own cure
        fault, _, cure = first["msg"].removeprefix("Value error, ").partition("; ")
        named = [key for key in settings if key in fault.replace(",", " ").split()]
        sources = dict.fromkeys(settings[key].source for key in named)
        return UserError(f"{', '.join(sources) or 'configuration'}: {fault}", cure)
    key = str(first["loc"][0])
    messages = [entry["msg"] for entry in error.errors() if entry["loc"][:1] == (key,)]
    field = TrainConfig.model_fields[key]
    setting = settings[key]
    return UserError(
        f"{setting.source}: {key}: {shown(setting.value)} {_expectation(messages)}",
        f"{key} means: {field.description}",
    )


def _expectation(messages: Sequence[str]) -> str:
    """pydantic's messages about one value, worded to follow that value."""
    kinds = [message.removeprefix("Input should be ") for message in messages]
    if kinds[0] == messages[0]:  # "String should match ...", "Input is not a valid path for <...>"
        return messages[0].partition(" ")[2].partition(" for <")[0]
    # A union reports every member; together they are what is allowed.
    return f"should be {' or '.join(dict.fromkeys(kinds))}".replace("a valid tuple", "a list")


def config_to_yaml(config: TrainConfig) -> str:
    """YAML text that loads as the same configuration."""
    return settings_to_yaml(config_to_dict(config))


def settings_to_yaml(settings: Mapping[str, Any]) -> str:
    """YAML text of plain values by key."""
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain values (numbers, text, lists) by key."""
    return config.model_dump(mode="json")
