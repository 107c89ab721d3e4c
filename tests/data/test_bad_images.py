from pathlib import Path

import pytest

from training_framework.data.bad_images import BadImages
from training_framework.errors import UserError


@pytest.mark.parametrize(
    ("count", "limit"),
    [(1, 0), (2, 0), (3, 1), (20, 9), (21, 10), (1000, 10), (1500, 15), (1_281_167, 12811)],
)
def test_one_percent_or_ten_may_be_bad_but_never_half(count: int, limit: int) -> None:
    assert BadImages(train=count, val=0).limit("train") == limit


def test_each_is_said_and_counted_once_and_splits_count_apart() -> None:
    said: list[str] = []
    bad = BadImages(train=100, val=3, report=said.append)
    bad.add("train", {"a.jpg": "is truncated"})
    bad.add("train", {"a.jpg": "is truncated", "b.jpg": "is empty"})
    bad.add("val", {"c.jpg": "is a\nbomb"})
    assert len(bad) == 3
    assert said == [
        "note: skipped a.jpg: is truncated",
        "note: skipped b.jpg: is empty",
        "note: skipped c.jpg: is a bomb",
    ]
    with pytest.raises(UserError, match=r"2 images of the val split .* 1 of 3 .*: c.jpg, d.jpg"):
        bad.add("val", {"d.jpg": "is empty"})


def test_many_are_listed_but_not_all_said(tmp_path: Path) -> None:
    said: list[str] = []
    bad = BadImages(train=5000, val=0)
    bad.list_in(tmp_path / "bad.txt", said.append)
    bad.add("train", {f"{number}.jpg": "is empty" for number in range(50)})
    assert len(said) == 11 and said[-1] == "note: further bad images are listed but not shown"
    assert len((tmp_path / "bad.txt").read_text().splitlines()) == 50
    with pytest.raises(UserError, match=r"51 images .*, \.\.\.; repair .*bad\.txt lists them"):
        bad.add("train", {"last.jpg": "is empty"})


ODD = ["tab\t.jpg", "line\nbreak.jpg", "no\udcfftext.jpg", '"quoted".jpg', "100%.jpg", "ü 日本.jpg"]


def test_a_list_is_gone_on_from_whatever_the_names(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    first = BadImages(train=100, val=100, report=lambda line: None)
    first.add("val", {"early.jpg": "is empty"})
    first.list_in(path, lambda line: None)
    first.add("train", dict.fromkeys(ODD, "is empty"))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "val\tearly.jpg\tis empty"
    assert "train\t100%.jpg\tis empty" in lines and len(lines) == 1 + len(ODD)

    with path.open("a") as file:
        file.write("train\ttorn off by a ki")
    said: list[str] = []
    second = BadImages(train=100, val=100)
    second.list_in(path, said.append)
    assert second.by_split() == first.by_split()
    second.add("train", dict.fromkeys(ODD, "is empty"))
    second.add("val", {"late.jpg": "is empty"})
    assert said == ["note: skipped late.jpg: is empty"]
    assert path.read_text(encoding="utf-8").splitlines() == [*lines, "val\tlate.jpg\tis empty"]


@pytest.mark.parametrize("content", [b"train only\n", b"test\ta\tb\n", b"\xff\n", b'val\t"a\tb\n'])
def test_a_file_that_is_no_such_list_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.txt: not a list of bad images"):
        BadImages(train=9, val=9).list_in(tmp_path / "bad.txt", print)
    assert (tmp_path / "bad.txt").read_bytes() == content


def test_a_list_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    bad = BadImages(train=9, val=9)
    bad.list_in(tmp_path / "gone" / "bad.txt", lambda line: None)
    with pytest.raises(UserError, match=r"bad\.txt: cannot be written to \(No such file"):
        bad.add("train", {"a.jpg": "is empty"})
