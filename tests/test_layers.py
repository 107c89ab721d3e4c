"""Imports go one way: a module imports from layers below its own, or from its own package."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "training_framework"

# Packages and modules by layer; docs/design/0002-layers.md explains where this differs from the
# first draft.
LAYERS = [
    {"__init__", "errors", "dataset_facts", "memory_reuse", "native", "peak_flops"},
    {
        "config", "loss", "metrics", "flops", "precision", "hardware", "signals", "progress",
        "faults", "interval", "memory_shortage", "optimizers.schedules", "models.blocks",
        "benchmark.statistics", "reproducibility", "checkpoint.file",
    },
    {"plan", "data", "models", "optimizers", "loggers", "distributed"},
    {"step", "evaluation", "checkpoint", "run_directory", "stop_agreement"},
    {"cuda_graph", "finiteness", "micro_batching", "run_start"},
    {"training_steps", "training_log"},
    {"trainer", "network", "assembly", "network_assembly", "resumption", "run_record",
     "benchmark.result"},
    {"run"},
    {"train", "inference", "summary", "data_command"},
    {"benchmark", "profiling", "verification"},
    {"cli"},
    {"__main__"},
]  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def unit_of(module: str) -> str:
    """`plan.machine` belongs to `plan`; `optimizers.schedules` stands for itself."""
    named = {unit for layer in LAYERS for unit in layer}
    return module if module in named else module.partition(".")[0]


def layer_of(unit: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if unit in layer)


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import"
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    prefix = "training_framework."
    return {name.removeprefix(prefix) for name in found if name.startswith(prefix)}


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_point_downwards(file):
    module = module_name(file)
    unit = unit_of(module)
    package = module.partition(".")[0]
    for name in imported(file):
        other = unit_of(name)
        if name.partition(".")[0] == package:
            continue
        assert layer_of(other) < layer_of(unit), f"{module} must not import {name}"


def test_every_module_has_a_layer_and_a_telling_name():
    for file in FILES:
        module = module_name(file)
        assert any(unit_of(module) in layer for layer in LAYERS), module
        assert module.rpartition(".")[2] not in {"utils", "util", "helpers", "common", "misc"}


def test_modules_stay_readable():
    too_long = {module_name(f): n for f in FILES if (n := len(f.read_text().splitlines())) > 400}
    assert not too_long
