"""What documents say is what result files hold, and what the repository shows is public."""

import re
import subprocess
from pathlib import Path

import pytest

from training_framework.config.inheritance import shipped_configs
from training_framework.config.schema import TrainConfig

ROOT = Path(__file__).parents[2]


def test_generated_blocks_equal_their_result_files(forks):
    script = ROOT / "benchmarks" / "render_docs.py"
    done = forks.run(script, "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_opens_with_what_it_is_and_the_two_commands():
    opening = (ROOT / "README.md").read_text().splitlines()[:12]
    assert any(line.startswith("make demo") for line in opening)
    assert any(line.startswith("make test") for line in opening)


def test_every_flag_that_the_readme_shows_exists():
    flags = set(re.findall(r"(?<=\s)--([a-z][a-z-]+)", (ROOT / "README.md").read_text()))
    others = {"config", "help", "nproc-per-node", "logdir", "train-per-class", "val-per-class"}
    others |= {"classes", "seed", "vary", "base", "ablate", "output", "list", "shorter-side"}
    others |= {"verify", "long"}
    known = {key.replace("_", "-") for key in TrainConfig.model_fields}
    assert flags <= known | others


@pytest.mark.parametrize("path", [*shipped_configs().values()], ids=lambda path: path.stem)
def test_every_shipped_file_opens_with_what_it_is_for(path):
    assert path.read_text().startswith("# ")


def test_no_file_holds_a_path_of_a_machine():
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    pattern = re.compile(r"(?<![\w.])/(?:work|root|home/\w+)/")
    for name in names:
        file = ROOT / name
        if file.is_file() and file.suffix in {".py", ".md", ".json", ".yaml", ".toml", ".txt"}:
            assert not pattern.search(file.read_text(encoding="utf-8")), name
