"""YAML files that build on others: `extends: base.yaml`."""

import difflib
import re
from collections.abc import Hashable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from training_framework.config.names import ALIASES, canonical
from training_framework.errors import UserError

__all__ = ["Setting", "canonical_settings", "parse_yaml", "read_config_file", "shipped_configs"]


class Setting(NamedTuple):
    """A value, and where it was given (`my.yaml`, `--lr`), for error messages."""

    value: Any
    source: str


class _Loader(yaml.SafeLoader):
    """Safe YAML, but with an error for a key given twice, and 1e-3 read as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key_node.value for key_node, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                line = node.value[position][0].start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None, None, f"line {line}: the key {key!r} is given twice"
                )
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-3 for text, which nobody means in a training configuration.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def shipped_configs() -> dict[str, Path]:
    """Configurations that come with the package, by name: the presets and the recipes."""
    root = Path(str(resources.files("training_framework.config")))
    files = sorted(root.glob("presets/*.yaml")) + sorted(root.glob("recipes/*.yaml"))
    return {file.stem: file for file in files}


def read_config_file(path: str | Path) -> dict[str, Setting]:
    """Read a YAML file and everything that it extends.

    Args:
        path: A file, or the name of a shipped preset or recipe (`cpu-optimized`, `digits`).

    Returns:
        The settings by canonical key; where files disagree, the file that extends wins over the
        one it extends, and later entries of a list of `extends` win over earlier ones.

    Raises:
        UserError: The file is missing, no YAML mapping, part of a cycle, or contradicts itself.
    """
    return _read(_locate(str(path), Path(), named_in=""), chain=())


def _locate(name: str, folder: Path, named_in: str) -> Path:
    shipped = shipped_configs()
    path = folder / Path(name).expanduser()
    if path.is_file():
        return path
    if name in shipped:
        return shipped[name]
    if path.is_dir():
        raise UserError(f"{named_in}{path}: is a folder", "name a YAML file")
    near = difflib.get_close_matches(name, shipped, n=1)
    raise UserError(
        f"{named_in}{path}: no such configuration file",
        f"did you mean {near[0]}?"
        if near
        else f"name a YAML file, or one of those shipped: {', '.join(shipped)}",
    )


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Setting]:
    resolved = path.resolve()
    if resolved in chain:
        names = " -> ".join(file.name for file in (*chain[chain.index(resolved) :], resolved))
        raise UserError(f"{path}: extends goes round in a circle ({names})", "break the circle")
    content = _parse(path)
    bases = content.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(
            f"{path}: extends: {bases!r} is no file name", "give one file name, or a list of them"
        )
    settings: dict[str, Setting] = {}
    for base in bases:
        settings.update(_read(_locate(base, path.parent, f"{path}: extends: "), (*chain, resolved)))
    settings.update(canonical_settings(content, str(path)))
    return settings


def parse_yaml(text: str) -> Any:
    """Safe YAML with this framework's rules: no key twice, and 1e-3 is a number.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: The text is no such YAML.
    """
    return yaml.load(text, Loader=_Loader)


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no UTF-8 text ({error.reason})", "name a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check the file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}: is no valid YAML{where}: {problem}", "mend that line") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: holds no `key: value` lines", "write one setting a line")
    return content


def canonical_settings(content: Mapping[str, Any], source: str) -> dict[str, Setting]:
    """One file's or one command line's settings under their canonical names."""
    settings: dict[str, Setting] = {}
    given_as: dict[str, str] = {}
    for name, value in content.items():
        key, key_value = canonical(name, value)
        if key in settings and settings[key].value != key_value:
            raise UserError(
                f"{source}: {given_as[key]} is {content[given_as[key]]!r} but {name} is {value!r}, "
                "and both mean one thing",
                f"keep one of them ({ALIASES.get(name, name)})",
            )
        settings[key] = Setting(key_value, source)
        given_as[key] = name
    return settings
