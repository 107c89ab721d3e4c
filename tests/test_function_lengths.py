"""No function is too long to be read at once."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "training_framework"
MAX_LINES = 50


def lengths(source: str) -> Iterator[tuple[str, int]]:
    """Names of all functions, and the lines of their bodies without the docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[ast.get_docstring(node) is not None :]
            first = body[0].lineno if body else node.lineno
            yield node.name, (node.end_lineno or first) - first + 1 if body else 0


def test_lengths_leave_out_signature_and_docstring():
    source = 'def f(\n    a,\n):\n    """One.\n\n    Two.\n    """\n    a += 1\n    return a\n'
    assert list(lengths(source)) == [("f", 2)]


def test_no_function_is_longer_than_fifty_lines():
    found = {
        f"{path.relative_to(PACKAGE).as_posix()} {name}": lines
        for path in PACKAGE.rglob("*.py")
        for name, lines in lengths(path.read_text(encoding="utf-8"))
    }
    assert {name: lines for name, lines in found.items() if lines > MAX_LINES} == {}
