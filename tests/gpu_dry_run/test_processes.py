"""Rank 0 of eight processes, each with a GPU."""

import pytest
from findings import findings

GIVEN = {"batch_size": 256, "log_every_n_steps": 2}
RUNS = {
    "as planned": GIVEN,
    "accumulated, compiled, average, clipped": {
        "batch_size": 128, "accumulate_grad_batches": 2, "compile": True, "ema_decay": 0.9,
        "grad_clip_val": 1.0,
    },
}  # fmt: skip
FURTHER_RUNS = {
    "fp16, from the host": {
        **GIVEN, "precision": "16-mixed", "resident_data": False, "num_workers": 0,
    },
    "adamw, little memory": {**GIVEN, "optimizer": "adamw", "activation_checkpointing": True},
    "bottlenecks": {**GIVEN, "model": "resnet50"},
}  # fmt: skip


def check_run(dry_run, settings):
    report = dry_run(settings, processes=8)
    assert (report.plan["device"], report.world_size) == ("cuda", 8)
    assert report.steps == report.epochs * report.steps_per_epoch
    assert findings(report) == []
    in_steps = [(name, when) for name, _, when in report.collectives if when.startswith("step")]
    assert len(in_steps) == len(set(in_steps)) == report.steps  # there is one bucket
    return report


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_eight_is_whole_and_its_steps_only_add_up_gradients(dry_run, name):
    report = check_run(dry_run, RUNS[name])
    if RUNS[name] is not GIVEN:
        return
    # Rows after steps 2, 4 and 5, and agreements after each but step 3, which comes at once.
    between = [where.split()[-1] for _, where, when in report.waits if when == "between steps"]
    assert between.count("read_over_processes") == 3
    assert sorted(set(between)) == ["largest", "read", "read_over_processes"]
    assert between.count("largest") <= 5
    assert between.count("read") == 1  # the samples of the epoch


@pytest.mark.long
@pytest.mark.parametrize("name", FURTHER_RUNS)
def test_further_runs_of_eight_are_whole(dry_run, long, name):
    if not long:
        pytest.skip("with --long")
    check_run(dry_run, FURTHER_RUNS[name])
