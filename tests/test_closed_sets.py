"""Names of networks, data sets, schedules, optimizers and switches stand in one module each."""

import ast
import re
from pathlib import Path

import pytest

import training_framework
from training_framework.config.architectures import MODELS
from training_framework.config.data_sets import DATA_SETS
from training_framework.config.schema import OptimizerName, TrainConfig
from training_framework.optimizers import OPTIMIZERS
from training_framework.schedules import SCHEDULES
from training_framework.switches import SWITCHES

ROOT = Path(training_framework.__file__).parent
SETS = {
    "config/architectures.py": set(MODELS),
    "config/data_sets.py": set(DATA_SETS),
    "schedules.py": set(SCHEDULES),
    "config/schema.py": set(OptimizerName.__args__),
}
# As many names in one expression are a list of them, not a mention.
A_LIST = 3


def strings_by_expression(file: Path) -> list[list[str]]:
    """The texts in each tuple, list, set, dict and subscript of a module, and each text alone.

    Docstrings are left out: they may give examples.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and is_text(node.value):
            node.value = ast.Constant(None)
    groups = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Subscript | ast.Dict):
            groups.append([n.value for n in ast.walk(node) if is_text(n)])
        elif is_text(node):
            groups.append([node.value])
    return groups


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def words(texts: list[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"[\w-]+", text)}


@pytest.mark.parametrize("home", SETS)
def test_a_closed_set_is_listed_in_one_module(home):
    names = SETS[home]
    elsewhere = {
        str(file.relative_to(ROOT)): sorted(words(group) & names)
        for file in ROOT.rglob("*.py")
        for group in strings_by_expression(file)
        if str(file.relative_to(ROOT)) != home
        and len(words(group) & names) >= min(A_LIST, len(names))
    }
    assert not elsewhere


def test_the_tables_and_the_configuration_agree():
    assert set(OPTIMIZERS) == set(OptimizerName.__args__)
    for key, table in (("model", MODELS), ("scheduler", SCHEDULES), ("optimizer", OPTIMIZERS)):
        for name in table:
            extra = {"milestones": (1.0,)} if name == "multi_step" else {}
            assert getattr(TrainConfig(**{key: name, **extra}), key) == name
            assert name in (TrainConfig.model_fields[key].description or "")


def test_a_switch_is_made_in_one_place():
    made = [
        node
        for file in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Switch"
    ]
    assert len(made) == len(SWITCHES)
