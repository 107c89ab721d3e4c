"""docs/extending.md is carried out, section by section, in a copy of the package."""

import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
FILES_AT_MOST = {"switch": 3, "data set": 2, "logger": 2, "ResNet variant": 1, "schedule": 1}
BELOW = re.compile(r"^In `(?P<file>[^`]+)`, below `(?P<line>[^`]+)`:$")
NEW = re.compile(r"^A new file, `(?P<file>[^`]+)`:$")


class Step(NamedTuple):
    """A block of code, the file it goes into (None: it is run), and the line it goes below."""

    code: str
    file: str | None
    below: str | None


def steps_of(section: str) -> list[Step]:
    steps = []
    parts = re.split(r"^```python\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
    for prose, code in zip(parts[::2], parts[1::2], strict=False):
        said = prose.strip().splitlines()[-1] if prose.strip() else ""
        below, new = BELOW.match(said), NEW.match(said)
        if below:
            steps.append(Step(code, below["file"], below["line"]))
        else:
            steps.append(Step(code, new["file"] if new else None, None))
    return steps


SECTIONS = {
    match[1]: steps_of(match[2])
    for match in re.finditer(
        r"^## An? ([\w ]+):.*?\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE
    )
}


def carry_out(step: Step, copy: Path) -> None:
    assert step.file is not None
    file = copy / step.file
    if step.below is None:
        assert not file.exists()
        file.write_text(step.code, encoding="utf-8")
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    (place,) = [number for number, line in enumerate(lines) if step.below in line]
    lines.insert(place + 1, step.code)
    file.write_text("".join(lines), encoding="utf-8")


def test_every_extension_is_explained_and_touches_no_more_files_than_it_should():
    assert SECTIONS.keys() == FILES_AT_MOST.keys()
    for name, steps in SECTIONS.items():
        touched = {step.file for step in steps if step.file is not None}
        assert 1 <= len(touched) <= FILES_AT_MOST[name], (name, touched)
        assert steps[-1].file is None, f"{name}: nothing shows that it works"


@pytest.mark.parametrize("name", SECTIONS)
def test_what_a_section_says_works(name, tmp_path, forks):
    copy = tmp_path / "copy"
    # With their times, so that what is compiled of the unchanged files stays valid.
    shutil.copytree(ROOT / "training_framework", copy / "training_framework")
    *changes, use = SECTIONS[name]
    for step in changes:
        carry_out(step, copy)
    done = forks.run("-W", "error", "-c", use.code, cwd=tmp_path, env=environment(copy))
    assert done.returncode == 0, done.stderr


def environment(copy: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
