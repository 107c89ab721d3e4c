import dataclasses

import pytest

from training_framework.config import load_config
from training_framework.measure.profile.advice import give_verdict
from training_framework.measure.profile.ceilings import Ceilings, find_limit
from training_framework.measure.profile.step_clock import PHASES
from training_framework.train import plan_for

SETTINGS = {
    "data": "synthetic", "synthetic_train_images": 36, "accelerator": "cpu", "precision": "32",
}  # fmt: skip
STARVED = Ceilings(loader=412, model=655, both=405)
COMPUTING = Ceilings(loader=5000, model=410, both=400)
LAUNCHING = Ceilings(loader=5000, model=410, both=400, device_busy=0.6)


@pytest.mark.parametrize(
    ("ceilings", "data_share", "limit"),
    [
        (STARVED, 0.4, "loader-bound"),
        # One sign alone is noise.
        (STARVED, 0.04, "compute-bound"),
        (COMPUTING, 0.4, "compute-bound"),
        (LAUNCHING, 0.01, "launch-bound"),
        (Ceilings(loader=1, model=400, both=400, device_busy=0.9), 0.01, "compute-bound"),
        (Ceilings(loader=412, model=655, both=405, device_busy=0.3), 0.4, "loader-bound"),
    ],
)
def test_limits_follow_from_the_figures(ceilings, data_share, limit):
    assert find_limit(ceilings, data_share) == limit


@pytest.mark.parametrize(
    ("model", "model_share", "agree"),
    [(410, 0.98, True), (655, 0.6, True), (300, 1.0, False), (655, 0.97, False)],
)
def test_ceilings_that_cannot_be_of_one_machine_disagree(model, model_share, agree):
    assert Ceilings(loader=5000, model=model, both=400).agree(model_share) == agree


def verdict_for(ceilings, *, data=0.01, machine=None, facts=None, **plan):
    planned, hardware, found = plan_for(load_config(overrides=SETTINGS))
    shares = dict.fromkeys(PHASES, 0.0) | {"data": data, "backward": 1 - data}
    return give_verdict(
        ceilings,
        shares | plan.pop("shares", {}),
        plan=dataclasses.replace(
            planned, **{"threads": 4, "resident_data": False, "num_workers": 0, **plan}
        ),
        facts=dataclasses.replace(found, **(facts or {"storage": "files"})),
        hardware=dataclasses.replace(
            hardware, **{"cores": 4, "instruction_sets": (), "bf16_speed": None, **(machine or {})}
        ),
        bottleneck="aten::convolution_backward takes 62%",
    )


def test_a_loader_bound_verdict_gives_both_figures():
    text = str(verdict_for(STARVED, data=0.4))
    assert text.startswith("loader-bound: 405 of a possible 655 images/s (the loader alone: 412)")


@pytest.mark.parametrize(
    ("changes", "next_step"),
    [
        ({}, "set num_workers: 1 or more"),
        ({"num_workers": 2}, "raise num_workers from 2 to 3"),
        ({"num_workers": 4}, "store the images smaller"),
        ({"num_workers": 4, "facts": {"storage": "arrays", "array_bytes": 2**20}}, "resident_data"),
        ({"facts": {"storage": "loader"}}, "your own DataLoader"),
        ({"resident_data": True, "facts": {"storage": "arrays"}}, "raise batch_size"),
        (
            {"num_workers": 4, "facts": {"storage": "arrays", "array_bytes": 2**60}},
            "more than 4 core(s)",
        ),
    ],
)
def test_a_starving_run_is_told_what_its_plan_leaves_open(changes, next_step):
    assert next_step in verdict_for(STARVED, data=0.4, **changes).next_step


@pytest.mark.parametrize(
    ("changes", "next_step"),
    [
        ({"compile": False}, "set compile: true"),
        ({"compile": True, "compile_mode": "default"}, "set compile_mode: reduce-overhead"),
        ({"compile": True, "compile_mode": "reduce-overhead"}, "raise batch_size from 64"),
    ],
)
def test_a_run_that_waits_for_launches_is_told_to_make_fewer(changes, next_step):
    verdict = verdict_for(LAUNCHING, device="cuda", **changes)
    assert "computing for 60% of the time" in verdict.figures
    assert next_step in verdict.next_step


@pytest.mark.parametrize(
    ("changes", "next_step"),
    [
        ({}, "only the arithmetic is left (aten::convolution_backward takes 62%)"),
        ({"machine": {"instruction_sets": ("amx",)}}, "set precision: mixed"),
        ({"threads": 1}, "raise threads from 1 to 4"),
        ({"channels_last": False}, "set channels_last: true"),
        ({"activation_checkpointing": True}, "set activation_checkpointing: false"),
        ({"shares": {"transform": 0.2}}, "less augmentation: it takes 20%"),
        ({"shares": {"logging": 0.2}}, "raise log_every_n_steps"),
        ({"shares": {"optimizer": 0.2}}, "raise batch_size or accumulate_grad_batches"),
        ({"device": "cuda", "precision": "bf16-mixed"}, "set compile: true"),
    ],
)
def test_a_computing_run_is_told_what_its_plan_leaves_open(changes, next_step):
    verdict = verdict_for(COMPUTING, **changes)
    assert verdict.limit == "compute-bound"
    assert next_step in verdict.next_step
