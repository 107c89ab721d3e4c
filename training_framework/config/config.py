"""`Config`: TrainConfig for notebooks, with upper-case names."""

from typing import Any

from training_framework.config.inheritance import Setting
from training_framework.config.loading import build_config, check_value
from training_framework.config.names import ALIASES, canonical, nearest
from training_framework.config.schema import TrainConfig
from training_framework.errors import UserError

__all__ = ["Config", "TrainConfig"]

_NAMES = {name.upper(): name for name in (*TrainConfig.model_fields, *ALIASES)}


class _ConfigType(type):
    """Checks every name and value on assignment, so that no typo goes unnoticed."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        settings = {key: value for key, value in namespace.items() if key.isupper()}
        plain = {key: value for key, value in namespace.items() if not key.isupper()}
        created: Any = super().__new__(cls, name, bases, plain)
        created._settings = {}
        for key, value in settings.items():
            setattr(created, key, value)
        return created

    def __setattr__(cls, name: str, value: Any) -> None:
        if not name.isupper():
            super().__setattr__(name, value)
            return
        key, key_value = canonical(_known(name), value)
        setting = Setting(key_value, f"Config.{name}")
        check_value(key, setting)
        cls._settings[key] = setting

    def __getattr__(cls, name: str) -> Any:
        if not name.isupper():
            raise AttributeError(name)
        key = canonical(_known(name), None)[0]
        setting = _all_settings(cls).get(key)
        value = setting.value if setting else TrainConfig.model_fields[key].default
        return value != "32" if name == "USE_AMP" else value

    def __dir__(cls) -> list[str]:
        return [*super().__dir__(), *_NAMES]


def _known(name: str) -> str:
    if name not in _NAMES:
        suggestion = nearest(name.lower()).replace("`efficient-resnet train --help`", "dir(Config)")
        raise UserError(f"Config.{name}: no such setting", _upper_case_suggestion(suggestion))
    return _NAMES[name]


def _upper_case_suggestion(suggestion: str) -> str:
    head, quote, rest = suggestion.partition("'")
    return head + quote + rest.upper() if quote else suggestion


def _all_settings(cls: type) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for base in reversed(cls.__mro__):
        settings.update(vars(base).get("_settings", {}))
    return settings


class Config(metaclass=_ConfigType):
    """Settings by upper-case name: `Config.BATCH_SIZE = 512`.

    Each name is a key of TrainConfig in upper case, or one of its aliases (LEARNING_RATE is LR,
    USE_AMP is PRECISION as a yes or no). Unassigned settings keep TrainConfig's default. Assigning
    an unknown name or a value of the wrong type raises a UserError. Subclass it to keep several
    sets of settings apart.
    """

    @classmethod
    def to_train_config(cls) -> TrainConfig:
        """The validated, frozen configuration.

        Raises:
            UserError: Two settings contradict each other.
        """
        return build_config(_all_settings(cls))

    @classmethod
    def reset(cls) -> None:
        """Forget every assignment made on this class."""
        cls._settings.clear()
