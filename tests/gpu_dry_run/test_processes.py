"""Rank 0 of eight processes, each with a GPU."""

import pytest
from findings import findings

from training_framework.training.cuda_graph import DDP_WARM_UP_STEPS

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


RECORDED = {"batch_size": 96, "cuda_graph": True, "stop_after_steps": DDP_WARM_UP_STEPS + 2}


def recorded_run(dry_run, plants=()):
    """A run of eight whose last two steps are replayed, the elements of its gradients, findings."""
    report = dry_run(RECORDED, processes=8, plants=plants)
    assert (report.steps, report.world_size) == (RECORDED["stop_after_steps"], 8)
    (gradients,) = {size for _, size, when in report.collectives if when == "step 1"}
    return report, gradients, findings(report)


def test_a_recorded_step_of_eight_adds_up_its_gradients_inside_the_graph(dry_run):
    report, gradients, found = recorded_run(dry_run)
    assert found == []
    replayed = [f"step {DDP_WARM_UP_STEPS + 1}", f"step {DDP_WARM_UP_STEPS + 2}"]
    assert [report.replayed.get(when) for when in replayed] == [2, 2]
    assert report.replayed_collectives == [["allreduce_", gradients, when] for when in replayed]
    # The host itself: nothing but, once, the agreement that all have recorded.
    launched = [what for what in report.collectives if what[2] in replayed]
    assert launched == [["allreduce_", 1, replayed[0]]]
    added_up = [when for _, size, when in report.collectives if size == gradients]
    assert added_up == [f"step {number + 1}" for number in range(DDP_WARM_UP_STEPS)]


@pytest.mark.long
def test_a_recording_without_the_sum_of_the_gradients_is_found(dry_run, long):
    if not long:
        pytest.skip("with --long")
    call = "            logits, loss = self._forward(images, labels, mixed)\n"
    plant = (
        "training_framework.training.cuda_graph:CudaGraphStep._record_backward", call,
        f"            with self.synchronization(False):\n    {call}",
    )  # fmt: skip
    _, _, found = recorded_run(dry_run, (plant,))
    assert f"gradients are not added up in step {DDP_WARM_UP_STEPS + 2}" in found


@pytest.mark.long
@pytest.mark.parametrize("name", FURTHER_RUNS)
def test_further_runs_of_eight_are_whole(dry_run, long, name):
    if not long:
        pytest.skip("with --long")
    check_run(dry_run, FURTHER_RUNS[name])
