"""Settings as flags of a command line: `batch_size` is `--batch-size`."""

import argparse
import types
import typing
from collections.abc import Sequence
from typing import Any

import yaml

from training_framework.config.inheritance import parse_yaml
from training_framework.config.names import ALIASES
from training_framework.config.schema import TrainConfig, sections

__all__ = ["add_config_flags", "given_settings"]


def add_config_flags(parser: argparse.ArgumentParser, keys: Sequence[str] | None = None) -> None:
    """Add a flag for every key of TrainConfig and each of its aliases.

    Args:
        parser: The parser of the command.
        keys: The keys that the command accepts; None: all of them, and `--config FILE`.
    """
    if keys is None:
        parser.usage = f"{parser.prog} [--config FILE] [--SETTING VALUE ...]"
        parser.add_argument(
            "--config", metavar="FILE", help="YAML file, or the name of a shipped one"
        )
    for section, members in sections().items():
        wanted = [key for key in members if keys is None or key in keys]
        if not wanted:
            continue
        group = parser.add_argument_group(section)
        for key in wanted:
            field = TrainConfig.model_fields[key]
            text = (field.description or "").replace("%", "%%") + _shown_default(field.default)
            _add_flag(group, key, text, may_be_bare=_is_switch(field.annotation))
            for alias, target in ALIASES.items():
                if target == key:
                    switch = alias == "use_amp" or _is_switch(field.annotation)
                    _add_flag(group, alias, argparse.SUPPRESS, may_be_bare=switch)


def _add_flag(group: Any, name: str, text: str, *, may_be_bare: bool) -> None:
    # A flag without a value means true, which only a boolean setting can be.
    bare: dict[str, Any] = {"nargs": "?", "const": "true"} if may_be_bare else {}
    group.add_argument(
        "--" + name.replace("_", "-"),
        dest=f"setting:{name}",
        default=argparse.SUPPRESS,
        metavar="VALUE",
        help=text,
        **bare,
    )


def _is_switch(annotation: Any) -> bool:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return any(_is_switch(member) for member in typing.get_args(annotation))
    return annotation is bool


def _shown_default(value: Any) -> str:
    if value is None or value == ():
        return ""
    return f" ({str(value).lower()})" if isinstance(value, bool) else f" ({value})"


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings given as flags, under the names used there, with YAML's types."""
    settings = {}
    for name, text in vars(options).items():
        _, found, key = name.partition("setting:")
        if found:
            settings[key] = _value(key, text)
    return settings


def _value(key: str, text: str) -> Any:
    """A flag's text parsed as YAML; a name or path stays text, whatever it looks like."""
    if text == "null":
        return None
    if key in ("name", "data_root", "output_dir", "weights", "resume"):
        return text
    if key == "milestones":
        text = f"[{text.strip('[]')}]"
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
