"""After the plan nobody reads the configuration, and every setting acts."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from training_framework.config import TrainConfig
from training_framework.plan import TrainPlan
from training_framework.plan.planner import _AS_ASKED

pytestmark = pytest.mark.usefixtures("narrow_networks")

ROOT = Path(__file__).parents[2] / "training_framework"
# Where configurations are made and planned: they are read here, and nowhere else.
PLANNING = {"config", "plan", "switches", "cli", "train"}
# Modules that make configurations from others, before there is a plan of theirs.
MAKERS = {
    "inference": "chooses the data to evaluate on, from a checkpoint's configuration",
    "measure.compare.environment": "a variant is planned only where the machine has what it needs",
    "measure.compare.training_runs": "each round's run is planned with a seed of its own",
    "measure.tune.space": "a trial is another configuration",
}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def is_config(node: ast.expr) -> bool:
    return "config" in ast.unparse(node).lower()


def reads(file: Path) -> Iterator[str]:
    """Settings that are read from something called a configuration, as `name:line`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            if node.attr in TrainConfig.model_fields and is_config(node.value):
                yield f"{ast.unparse(node)}:{node.lineno}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            yield from [f"{ast.unparse(node)}:{node.lineno}"] * is_config(node.args[0])


def files() -> list[Path]:
    return [file for file in sorted(ROOT.rglob("*.py")) if module_of(file) != "__init__"]


@pytest.mark.parametrize("file", files(), ids=module_of)
def test_nobody_reads_the_configuration_after_the_plan(file):
    module = module_of(file)
    if module.split(".")[0] in PLANNING or module in MAKERS:
        return
    assert list(reads(file)) == []


def test_the_modules_that_may_read_it_do():
    reading = {module_of(file) for file in files() if list(reads(file))}
    assert MAKERS.keys() <= reading


def test_the_reader_finds_what_it_looks_for(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text("def f(config):\n    return config.momentum, getattr(self._config, key)\n")
    assert list(reads(planted)) == ["config.momentum:2", "getattr(self._config, key):2"]


def test_every_setting_is_read_where_plans_are_made():
    """From the configuration by its name, by a switch by its key, or taken over as it is."""
    read = set(_AS_ASKED)
    for file in files():
        package = module_of(file).split(".")[0]
        if package == "plan":
            read |= {line.split(":")[0].rpartition(".")[2] for line in reads(file)}
        elif package == "switches":
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant):
                    read.add(str(node.value))
                elif isinstance(node, ast.Attribute) and is_config(node.value):
                    read.add(node.attr)
    assert set(TrainConfig.model_fields) - read == set()


def test_every_field_of_the_plan_is_read_by_somebody():
    """A setting that the plan takes over and nobody looks at would do nothing."""
    used: set[str] = set()
    for file in files():
        if module_of(file).startswith("config"):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and "config" not in ast.unparse(node.value).lower():
                used.add(node.attr)
            elif isinstance(node, ast.Constant) and module_of(file).startswith("switches"):
                used.add(str(node.value))  # a switch applies its own value, by its key
    fields = {field.name for field in dataclasses.fields(TrainPlan)}
    assert fields - used == set()
