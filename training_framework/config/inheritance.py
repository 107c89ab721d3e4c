"""YAML files, and the files that they extend: `extends: base.yaml`."""

import difflib
import re
from collections.abc import Hashable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from training_framework.config.data_sets import DATA_SETS
from training_framework.config.names import ALIASES, canonical
from training_framework.errors import UserError, shown

__all__ = [
    "Setting",
    "canonical_settings",
    "parse_yaml",
    "read_config_file",
    "read_yaml_text",
    "shipped_configs",
]

_MAX_BYTES = 128 << 10
_MAX_VALUES = 100_000
_MAX_FILES = 100


class Setting(NamedTuple):
    """A value, and where it was given (`my.yaml`, `--lr`), for error messages."""

    value: Any
    source: str


class _Loader(yaml.SafeLoader):
    """Safe YAML, but with an error for a key given twice, and 1e-3 read as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set[str]()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key, str):  # a list or mapping, which cannot be a dictionary's key
                continue
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None, None, f"line {line}: the key {key!r} is given twice"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-3 as text, which is never meant in a training configuration.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def shipped_configs() -> dict[str, Path]:
    """The configurations shipped with the package, by name: presets and recipes."""
    root = Path(str(resources.files("training_framework.config")))
    files = sorted(root.glob("presets/*.yaml")) + sorted(root.glob("recipes/*.yaml"))
    return {file.stem: file for file in files}


def read_config_file(path: str | Path) -> dict[str, Setting]:
    """Read a YAML file and all files that it extends.

    Args:
        path: A file, or the name of a shipped preset or recipe (`cpu-optimized`, `digits`).

    Returns:
        The settings by canonical key. Where files disagree, a file overrides those that it
        extends, and later entries of an `extends` list override earlier ones.

    Raises:
        UserError: The file is missing, not a YAML mapping, part of a cycle, or contradicts itself.
    """
    return _read(_locate(str(path), Path(), named_in=""), chain=(), known={})


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
        else f"name a YAML file or a shipped configuration: {', '.join(shipped)}",
    )


def _read(
    path: Path, chain: tuple[Path, ...], known: dict[Path, dict[str, Setting]]
) -> dict[str, Setting]:
    """The settings of a file. `known` holds the files already read, so each is read once."""
    resolved = path.resolve()
    if resolved in known:
        return known[resolved]
    if len(known) + len(chain) >= _MAX_FILES:
        raise UserError(f"{path}: extends names more than {_MAX_FILES} files", "merge some of them")
    if resolved in chain:
        names = " -> ".join(file.name for file in (*chain[chain.index(resolved) :], resolved))
        raise UserError(f"{path}: extends forms a cycle ({names})", "break the cycle")
    content = _parse(path)
    bases = content.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(
            f"{path}: extends: {shown(bases)} is not a file name",
            "give one file name, or a list of them",
        )
    settings: dict[str, Setting] = {}
    for base in bases:
        base_file = _locate(base, path.parent, f"{path}: extends: ")
        settings.update(_read(base_file, (*chain, resolved), known))
    settings.update(canonical_settings(content, str(path)))
    known[resolved] = settings
    return settings


def parse_yaml(text: str) -> Any:
    """Parse safe YAML with this framework's rules: no key twice, and 1e-3 is a number.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: The text is not such YAML, or its aliases
            expand to far more than is written.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_bomb(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def read_yaml_text(path: Path) -> str:
    """The text of a YAML file written by hand.

    Raises:
        UserError: It cannot be read, is not UTF-8 text, or is far too large.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(
                f"{path}: is larger than {_MAX_BYTES >> 10} KiB", "name a YAML file of settings"
            )
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason})", "name a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check the file") from None


def _refuse_bomb(root: yaml.Node) -> None:
    """Refuse aliases that contain themselves, or expand to a billion values in ten lines."""
    sizes: dict[int, int] = {}
    under_way = set[int]()

    def size_of(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        key = id(node)
        if key not in sizes:
            if key in under_way:
                raise yaml.composer.ComposerError(
                    None, None, "an alias contains itself", node.start_mark
                )
            under_way.add(key)
            parts = node.value
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            sizes[key] = 1 + sum(size_of(part) for part in parts)
        return sizes[key]

    if size_of(root) > _MAX_VALUES:
        raise yaml.composer.ComposerError(
            None, None, f"its aliases expand to more than {_MAX_VALUES} values", root.start_mark
        )


def _parse(path: Path) -> dict[str, Any]:
    text = read_yaml_text(path)
    try:
        content = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}: is not valid YAML{where}: {problem}", "fix that line") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: contains no `key: value` lines", "write one setting per line")
    return content


def canonical_settings(content: Mapping[str, Any], source: str) -> dict[str, Setting]:
    """The settings of one file or command line under their canonical names."""
    settings: dict[str, Setting] = {}
    given_as: dict[str, str] = {}
    for name, value in content.items():
        key, key_value = canonical(name, value)
        if key in settings and settings[key].value != key_value:
            raise UserError(
                f"{source}: {given_as[key]} is {shown(content[given_as[key]])} but {name} is "
                f"{shown(value)}, and both name the same setting",
                f"keep one of them ({ALIASES.get(name, name)})",
            )
        settings[key] = Setting(key_value, source)
        given_as[key] = name
    _take_data_by_path(settings)
    return settings


def _take_data_by_path(settings: dict[str, Setting]) -> None:
    """Treat `data: PATH` as `data_root: PATH`; the folder's content decides the data set."""
    if "data" not in settings:
        return
    data, source = settings["data"]
    if not isinstance(data, str) or not _is_path(data):
        return
    root = settings.get("data_root")
    if root is not None and root.value is not None:
        raise UserError(
            f"{source}: data is {shown(data)} but data_root is {shown(root.value)}",
            "keep one of them",
        )
    settings["data"], settings["data_root"] = Setting(None, source), Setting(data, source)


def _is_path(data: str) -> bool:
    return data not in DATA_SETS and (Path(data).name != data or Path(data).is_dir())
