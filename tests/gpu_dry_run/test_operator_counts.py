"""How many operators the host launches for a step: the table in docs/design/0006-recorded-steps.md.

Each takes the host several microseconds, which small batches on a fast GPU wait for.
"""

import re
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "design" / "0006-recorded-steps.md"
RESNET18 = {
    "data": "synthetic", "synthetic_train_images": 1024, "synthetic_val_images": 128,
    "model": "resnet18", "batch_size": 128, "crop_padding": 4,
}  # fmt: skip
ROWS = {
    "eager": {},
    "recorded": {"cuda_graph": True},
    "recorded, weight average, mixup and cutout": {
        "cuda_graph": True, "ema_decay": 0.99, "mixup": 0.2, "cutout": 8,
    },
}  # fmt: skip
STEP = "step 6"  # after the warm-up and the recording, and without a logged row


@pytest.mark.parametrize("name", ROWS)
def test_the_documents_table_holds(dry_run, name):
    report = dry_run({**RESNET18, **ROWS[name]})
    counts = [report.launched[STEP], report.replayed.get(STEP, 0), sum(report.recorded)]
    row = re.search(rf"^\| {name} \| (\d+) \| (\d+) \| (\d+) \|$", DOCUMENT.read_text(), re.M)
    assert row is not None
    assert [int(count) for count in row.groups()] == counts
