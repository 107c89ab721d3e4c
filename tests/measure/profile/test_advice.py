import dataclasses
import functools

import pytest

from training_framework.config import load_config
from training_framework.config.loading import config_to_dict
from training_framework.machine.hardware import Accelerator, Hardware
from training_framework.measure.profile.advice import Run, Suggestion, give_verdict
from training_framework.measure.profile.ceilings import Ceilings, find_limit
from training_framework.measure.profile.step_clock import PHASES
from training_framework.plan import make_plan
from training_framework.plan.planned_run import open_configured_dataset

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


GPU = Accelerator(
    kind="cuda", name="NVIDIA A100-SXM4-80GB", memory_bytes=80 * 2**30, bf16=True, capability=(8, 0)
)
OLD_GPU = dataclasses.replace(GPU, name="NVIDIA GeForce GTX 1080", bf16=False, capability=(6, 1))
FACTS = {"storage": "files"}


def run_of(*, gpu=None, machine=None, facts=FACTS, **settings):
    """A run on a machine that is described and not there."""
    config = load_config(
        overrides={
            **SETTINGS, "accelerator": "gpu" if gpu else "cpu", "threads": 4, "num_workers": 0,
            "resident_data": False, **settings,
        }
    )  # fmt: skip
    hardware = dataclasses.replace(HARDWARE, accelerators=(gpu,) if gpu else (), **(machine or {}))
    found = dataclasses.replace(synthetic_facts(), **facts)
    return Run(
        settings=config_to_dict(config), plan=make_plan(config, hardware, found),
        facts=found, hardware=hardware,
    )  # fmt: skip


@functools.cache
def synthetic_facts():
    return open_configured_dataset(load_config(overrides=SETTINGS)).facts


HARDWARE = Hardware(
    cpu_name="a processor", cores=4, instruction_sets=(), memory_bytes=64 * 2**30, accelerators=(),
    cpp_compiler="g++", cpp_compiler_fault="",
)  # fmt: skip


def verdict_for(ceilings, *, data=0.01, shares=None, **run):
    measured = dict.fromkeys(PHASES, 0.0) | {"data": data, "backward": 1 - data} | (shares or {})
    return give_verdict(
        ceilings, measured, run=run_of(**run), bottleneck="aten::convolution_backward takes 62%"
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
        ({"cuda_graph": False, "compile": False}, "set cuda_graph: true"),
        ({"cuda_graph": False, "compile": True, "compile_mode": "default"}, "set cuda_graph: true"),
        (
            {"cuda_graph": False, "compile": True, "compile_mode": "reduce-overhead"},
            "with compile_mode: default",
        ),
        (
            {"cuda_graph": True, "compile": False},
            "set compile: true with compile_mode: default",
        ),
        ({"cuda_graph": True, "compile": True}, "raise batch_size from 36"),
        # It cannot be recorded:
        (
            {"accumulate_grad_batches": 2, "compile": False},
            "set compile: true with compile_mode: reduce-overhead",
        ),
        (
            {"accumulate_grad_batches": 2, "compile": True, "compile_mode": "default"},
            "set compile_mode: reduce-overhead",
        ),
        # Nor compiled:
        (
            {
                "accumulate_grad_batches": 2, "compile": False,
                "machine": {"triton_fault": "Triton is not installed"},
            },
            "raise batch_size from 36",
        ),
        (
            {"gpu": OLD_GPU, "cuda_graph": True, "compile": False},
            "raise batch_size from 36",
        ),
    ],
)  # fmt: skip
def test_a_run_that_waits_for_launches_is_told_to_make_fewer(changes, next_step):
    verdict = verdict_for(LAUNCHING, **{"gpu": GPU, **changes})
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
        ({"gpu": GPU, "precision": "bf16-mixed", "compile": False}, "set compile: true"),
        ({"gpu": GPU, "precision": "32"}, "set precision: mixed"),
        # Half precision and channels_last are slow on it, and it cannot compile.
        ({"gpu": OLD_GPU, "precision": "32", "channels_last": False}, "only the arithmetic"),
    ],
)
def test_a_computing_run_is_told_what_its_plan_leaves_open(changes, next_step):
    verdict = verdict_for(COMPUTING, **changes)
    assert verdict.limit == "compute-bound"
    assert next_step in verdict.next_step


PLANS = [
    {"gpu": gpu, "precision": precision, "channels_last": channels_last, "facts": facts, **compile_}
    for gpu in (None, GPU, OLD_GPU)
    for precision in ("auto", "32", *(["16-mixed"] if gpu else []))
    for channels_last in ("auto", False)
    for facts in (FACTS, {"storage": "arrays", "array_bytes": 2**20}, {"storage": "loader"})
    for compile_ in (
        {}, {"compile": False}, {"compile": True, "compile_mode": "reduce-overhead"},
        {"compile": True, "compile_mode": "max-autotune"}, {"cuda_graph": True},
        {"cuda_graph": True, "compile": True, "compile_mode": "default"},
        {"cuda_graph": False, "compile": False}, {"accumulate_grad_batches": 2},
        {"fused_optimizer": False}, {"activation_checkpointing": True, "num_workers": 4},
    )
    if facts is FACTS or not compile_
]  # fmt: skip


def test_every_suggestion_for_every_plan_is_accepted_and_changes_the_plan():
    phases = ({}, {"transform": 0.2}, {"logging": 0.2}, {"optimizer": 0.2})
    seen = set()
    for changes in PLANS:
        run = run_of(**changes)
        cases = [(STARVED, {"data": 0.4}), *((COMPUTING, shares) for shares in phases)]
        if changes["gpu"]:
            cases.append((LAUNCHING, {}))
        for ceilings, shares in cases:
            measured = dict.fromkeys(PHASES, 0.0) | {"data": 0.01} | shares
            verdict = give_verdict(ceilings, measured, run=run)
            seen.add(tuple(verdict.settings.items()))
            for key in verdict.settings:
                assert f"{key}" in verdict.next_step, (changes, verdict)
            new = run.plan_with(**verdict.settings)
            assert new is not None, (changes, verdict)
            if verdict.settings:
                assert new != run.plan, (changes, verdict)
                for key, value in verdict.settings.items():
                    if isinstance(value, bool):
                        assert new.switch_values()[key] == value, (changes, verdict)
    assert len(seen) > 12, seen


def test_a_suggestion_that_the_schema_refuses_cannot_be_followed():
    run = run_of(gpu=GPU, cuda_graph=True)
    refused = Suggestion(text="", settings={"compile": True, "compile_mode": "reduce-overhead"})
    assert not run.can_follow(refused)
    assert not run_of().can_follow(Suggestion(text="", settings={"cuda_graph": True}))
