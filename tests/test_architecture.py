import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
(PICTURE,) = re.findall(r"^```\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_the_picture_fits_into_80_columns():
    assert max(map(len, PICTURE.splitlines())) <= 80


def test_every_path_that_is_named_exists():
    named = {*re.findall(r"`([\w/]+(?:\.py|/))`", TEXT), *re.findall(r"[\w/]+\.py", PICTURE)}
    assert len(named) > 20
    package = ROOT / "training_framework"
    assert [
        name for name in named if name != f"{package.name}/" and not (package / name).exists()
    ] == []


def test_the_page_stays_one_page():
    assert len(TEXT.splitlines()) < 100
