"""What docs/reliability.md names as proof exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = re.sub(  # without the generated figures
    r"<!-- generated: .*?<!-- end -->\n",
    "",
    (ROOT / "docs/reliability.md").read_text(encoding="utf-8"),
    flags=re.DOTALL,
)


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) >= 15
    for file, test in named:
        assert (ROOT / file).is_file(), file
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert not test or test in names, f"{file} has no {test}"


def test_every_promise_has_a_proof():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line]
    promises = [row for row in rows if not row.startswith("| promise ")]
    assert len(promises) >= 10
    for row in promises:
        proof = row.split("|")[2]
        assert "`tests/" in proof or "the same" in proof, row


def test_every_script_that_the_page_names_exists():
    for script in re.findall(r"`(benchmarks/\w+\.py)`", PAGE):
        assert (ROOT / script).is_file(), script
