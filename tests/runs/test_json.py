import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training_framework.runs.directory import write_json


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_numbers_that_json_does_not_know_become_null(tmp_path: Path, number: float) -> None:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    path = tmp_path / "run.json"
    write_json(path, {"a": [1.5, number], "b": (number, {"c": number}), "path": path, "d": None})
    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "a": [1.5, None],
        "b": [None, {"c": None}],
        "path": str(path),
        "d": None,
    }
