"""Imports go one way: docs/design/0002-layers.md holds the table, this test reads it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "training_framework"
TABLE = Path(__file__).parent.parent / "docs/design/0002-layers.md"
FILES = sorted(ROOT.rglob("*.py"))
MAX_MODULES_AT_THE_ROOT = 12
MAX_LINES = 350


def read_layers() -> list[set[str]]:
    """The rows `| number | unit, unit |` of the table, from the bottom up."""
    rows = [line.split("|") for line in TABLE.read_text(encoding="utf-8").splitlines()]
    numbered = [(int(row[1]), row[2]) for row in rows if len(row) > 2 and row[1].strip().isdigit()]
    assert [number for number, _ in numbered] == list(range(len(numbered)))
    return [{unit.strip() for unit in units.split(",")} for _, units in numbered]


LAYERS = read_layers()


def layer_of(unit: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if unit in layer)


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def unit_of(module: str) -> str:
    return module.partition(".")[0]


def named_module(package: str, name: str) -> str:
    """What `from package import name` imports: a module of the package, or something in it."""
    module = f"{package}.{name}"
    path = ROOT.parent / module.replace(".", "/")
    return module if path.with_suffix(".py").exists() or path.is_dir() else package


def imported(file: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it."""
    prefix = "training_framework."
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import"
            found |= {named_module(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name.removeprefix(prefix) for name in found if name.startswith(prefix)}


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_point_downwards(file):
    module = module_name(file)
    for name in imported(file):
        if unit_of(name) != unit_of(module):
            assert layer_of(unit_of(name)) < layer_of(unit_of(module)), (
                f"{module} must not import {name}"
            )


def test_no_circle_among_the_modules():
    edges = {module_name(file): imported(file) for file in FILES}
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in finished or module not in edges:
            return
        for name in edges[module]:
            visit(name, (*path, module))
        finished.add(module)

    for module in edges:
        visit(module, ())


def test_every_unit_stands_in_the_table_once():
    units = [unit for layer in LAYERS for unit in layer]
    assert sorted(units) == sorted({unit_of(module_name(file)) for file in FILES})


def test_names_tell():
    for file in FILES:
        assert file.stem not in {"utils", "util", "helpers", "common", "misc"}, file


def test_the_root_stays_small():
    modules = [file for file in ROOT.glob("*.py") if file.stem != "__init__"]
    assert len(modules) <= MAX_MODULES_AT_THE_ROOT


def test_modules_stay_readable():
    lines = {module_name(f): len(f.read_text(encoding="utf-8").splitlines()) for f in FILES}
    assert not {module for module, count in lines.items() if count > MAX_LINES}
