import copy

import torch

from training_framework.measure.verify.difference import compare_rows, compare_states

ROWS = [
    {"step": "1", "train/loss": "1.5", "val/acc1": "", "images_per_second": "100"},
    {"step": "2", "train/loss": "1.25", "val/acc1": "40", "images_per_second": "90"},
]


def state():
    generator = torch.Generator().manual_seed(0)
    return {
        "model": {"conv.weight": torch.randn(2, 3, generator=generator), "count": torch.tensor(3)},
        "average": None,
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.zeros(4)}},
            "param_groups": [{"lr": 0.1}],
        },
        "scaler": {"scale": 65536.0},
        "progress": {"step": 7, "train_seconds": 1.0, "epochs": [{"seconds": 2.0, "epoch": 0}]},
        "config": {"name": "straight"},
    }  # fmt: skip


def only_difference(changed) -> str:
    (line,) = compare_states(state(), changed).differences
    return line


def test_equal_states_are_equal_whatever_times_and_names_say():
    other = state()
    other["progress"]["train_seconds"] = 9.0
    other["progress"]["epochs"][0]["seconds"] = 9.0
    other["config"] = {"name": "resumed"}
    comparison = compare_states(state(), other)
    assert comparison.differences == ()
    assert comparison.compared == (
        "weights and buffers: 2 tensors",
        "optimizer state: 1 tensor and 1 value",
        "gradient scaler: 1 value",
        "progress and sample order: 2 values",
    )


def test_the_first_tensor_that_differs_is_named_with_its_largest_difference():
    other = state()
    other["model"]["conv.weight"][1, 2] += 0.5
    other["model"]["count"] += 1
    line = only_difference(other)
    assert line == "weights and buffers: conv.weight differs by at most 0.5 (and 1 more)"


def test_one_bit_is_a_difference():
    other = state()
    other["model"]["conv.weight"].view(torch.int32)[0, 0] ^= 1
    assert "conv.weight differs by at most" in only_difference(other)
    negative_zero = state()
    negative_zero["optimizer"]["state"][0]["momentum_buffer"][3] = -0.0
    assert "state.0.momentum_buffer" in only_difference(negative_zero)


def test_equal_nans_are_equal():
    sides = [state(), state()]
    for side in sides:
        side["model"]["conv.weight"][0, 0] = torch.nan
        side["scaler"]["scale"] = float("nan")
    assert not compare_states(*sides).differences


def test_kinds_and_presence_count():
    other = state()
    other["scaler"]["scale"] = 65536
    assert only_difference(other) == (
        "gradient scaler: scale is 65536.0 straight and 65536 resumed"
    )
    other = state()
    del other["optimizer"]["param_groups"][0]["lr"]
    assert "param_groups[0].lr is only in the straight run" in only_difference(other)
    other = state()
    other["average"] = {"decay": 0.9}
    assert only_difference(other) == "weight average: decay is only in the resumed run"
    other = state()
    other["model"]["count"] = other["model"]["count"].int()
    assert "torch.int64 () straight and torch.int32 () resumed" in only_difference(other)


def test_rows_are_compared_but_for_what_is_measured():
    other = copy.deepcopy(ROWS)
    other[1]["images_per_second"] = "1"
    assert compare_rows(ROWS, other).differences == ()
    other[1]["train/loss"] = "1.2500001"
    assert compare_rows(ROWS, other).differences == (
        "metrics.csv: step 2: train/loss is 1.25 straight and 1.2500001 resumed",
    )
    assert compare_rows(ROWS, ROWS[:1]).differences == (
        "metrics.csv: 2 rows straight and 1 resumed",
    )
