"""No function is too long to be read at once."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "training_framework"
MOST_LINES = 50
# Functions that may be longer for now; no other may join them.
LONGER = {"plan/planner.py make_plan"}


def lengths(source: str) -> Iterator[tuple[str, int]]:
    """Names of all functions, and their lines without the docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            yield node.name, lines


def test_lengths_leave_out_only_the_docstring():
    source = 'def f(\n    a,\n):\n    """One.\n\n    Two.\n    """\n    return a\n'
    assert list(lengths(source)) == [("f", 4)]


def test_no_function_is_longer_than_fifty_lines_without_its_docstring():
    longer = {
        f"{path.relative_to(PACKAGE).as_posix()} {name}"
        for path in PACKAGE.rglob("*.py")
        for name, lines in lengths(path.read_text(encoding="utf-8"))
        if lines > MOST_LINES
    }
    assert longer == LONGER
