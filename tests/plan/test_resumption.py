"""A resumed run takes its plan from the checkpoint: nothing left to the plan is decided again."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training_framework.checkpoint import load_checkpoint, save_checkpoint
from training_framework.config import TrainConfig
from training_framework.config.loading import config_to_dict
from training_framework.config.schema import TRAJECTORY_FREE_KEYS
from training_framework.data.facts import DatasetFacts
from training_framework.errors import UserError
from training_framework.machine.distributed import Processes
from training_framework.machine.hardware import Hardware, detect_hardware
from training_framework.plan import PlannedRun, TrainPlan, make_plan, planned_run, resumed_plan
from training_framework.plan.planned_run import UserLoaders
from training_framework.plan.resumption import FREE_FIELDS
from training_framework.runs.start import Start, changed_settings
from training_framework.train import main
from training_framework.training import resuming

pytestmark = pytest.mark.usefixtures("narrow_networks")

FACTS = DatasetFacts(
    name="cifar10",
    train_images=50_000,
    val_images=10_000,
    class_names=tuple("abcdefghij"),
    image_size=32,
    storage="arrays",
    array_bytes=60_000 * 3072,
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
    crop_padding=4,
)
CPU = Hardware(
    cpu_name="some CPU",
    cores=8,
    instruction_sets=("avx512", "avx512_bf16"),
    memory_bytes=16 * 2**30,
    accelerators=(),
    bf16_speed=1.11,
    cpp_compiler="g++",
)
FP32 = {"precision": "32", "optimizer": "adam"}
ADAM = {"optimizer": "adam"}  # of which this PyTorch has a fused one


def plan_on(hardware: Hardware = CPU, **settings: Any) -> TrainPlan:
    processes = {key: settings.pop(key) for key in ("world_size",) if key in settings}
    return make_plan(TrainConfig(**settings), hardware, FACTS, local_world_size=1, **processes)


def resumed(
    then: TrainPlan, fresh: TrainPlan, hardware: Hardware = CPU, changed: tuple[str, ...] = ()
) -> tuple[TrainPlan, str]:
    plan, lines = resumed_plan(
        fresh, json.loads(json.dumps(then.as_dict())), hardware, changed=changed, where="last.ckpt"
    )
    return plan, "\n".join(lines)


def test_a_plan_is_the_same_after_json():
    plan = plan_on(output_dir="logs", milestones=(1.0, 2.0), scheduler="multi_step")
    assert TrainPlan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


def test_another_measured_speed_changes_no_precision():
    slower = dataclasses.replace(CPU, bf16_speed=1.09)
    then, fresh = plan_on(model="resnet50"), plan_on(slower, model="resnet50")
    assert (then.precision, fresh.precision) == ("bf16-mixed", "32")
    plan, lines = resumed(then, fresh, slower)
    assert plan.precision == "bf16-mixed"
    assert not plan.winograd_convolutions, "that is for fp32"
    assert "precision bf16-mixed (a new run here: 32)" in lines
    reasons = {choice.name: choice for choice in plan.choices}
    assert reasons["precision"].value == "bf16-mixed"
    why = {choice.name: choice.reason for choice in then.choices}["precision"]
    assert reasons["precision"].reason == f"as its run had decided: {why}"
    again, _ = resumed(plan, fresh, slower)
    assert again.choices == plan.choices, "no reason grows with every resumption"


def test_a_kept_switch_keeps_its_reason_where_a_new_run_would_not_name_it():
    then, fresh = plan_on(**FP32), plan_on(dataclasses.replace(CPU, instruction_sets=()), **FP32)
    assert then.fused_norms > fresh.fused_norms
    silent = dataclasses.replace(
        fresh, choices=tuple(c for c in fresh.choices if c.name != "fused_norms")
    )
    plan, _ = resumed(then, silent)
    reasons = {choice.name: choice.reason for choice in plan.choices}
    assert reasons["fused_norms"].startswith("as its run had decided: ")


@pytest.mark.parametrize("first_can", [True, False])
def test_the_first_process_decides_whether_the_machines_can_continue(monkeypatch, first_can):
    bare = dataclasses.replace(CPU, cpp_compiler=None)
    machines = [CPU, bare] if first_can else [bare, CPU]
    state = {"plan": plan_on(world_size=2, **FP32).as_dict(), "config": {}, "identity": {}}
    start = Start(state=state, checkpoint=Path("last.ckpt"))
    sent: list[Any] = []
    monkeypatch.setattr(resuming, "gathered", lambda own: sent.append(own) or sent)
    monkeypatch.setattr(resuming, "changed_settings", lambda start, planned: ())
    for rank, machine in enumerate(machines):
        planned = PlannedRun(
            plan=plan_on(machines[0], world_size=2, **FP32),
            settings={},
            hardware=machine,
            facts=FACTS,
            source=UserLoaders(None, None),
            processes=Processes(rank=rank, world_size=2),
        )
        if first_can:
            assert resuming.plan_resumption(planned, start)[0].plan.winograd_convolutions
        else:
            with pytest.raises(UserError, match="this machine cannot continue the run as planned"):
                resuming.plan_resumption(planned, start)


def test_the_length_of_an_epoch_is_that_of_the_plan():
    state = {
        "plan": {"accumulate_grad_batches": 4},
        "config": {"accumulate_grad_batches": 1},
        "identity": {"batches an epoch": 8},
    }
    assert resuming._shape_in(state).steps == 2
    assert resuming._shape_in({**state, "plan": None}).steps == 8


def test_another_measured_speed_changes_no_products():
    slower = dataclasses.replace(CPU, bf16_speed=1.09)
    then, fresh = plan_on(), plan_on(slower)
    assert (then.bf16_products, fresh.bf16_products) == (True, False)
    assert resumed(then, fresh, slower)[0].bf16_products


def test_a_plan_from_before_bf16_products_gets_none():
    older = plan_on(dataclasses.replace(CPU, bf16_speed=1.09)).as_dict()
    assert older["winograd_convolutions"] and plan_on().bf16_products
    del older["bf16_products"]
    plan, _ = resumed_plan(plan_on(), older, CPU, changed=(), where="last.ckpt")
    assert not plan.bf16_products


def started(config: dict[str, Any], **settings: Any) -> list[str]:
    """The settings that count as changed where a run with `config` is resumed."""
    state = {"config": config, "plan": plan_on(cuda_graph=False).as_dict()}
    now = TrainConfig(**settings)
    planned: Any = SimpleNamespace(plan=plan_on(**settings), settings=config_to_dict(now))
    return changed_settings(Start(state=state, checkpoint=Path("last.ckpt")), planned)


def test_a_setting_that_is_left_to_the_plan_now_is_not_changed():
    """Not even where the default was another one in the version that wrote the checkpoint."""
    then = config_to_dict(TrainConfig(cuda_graph=False))
    assert started(then) == []
    assert started(then, cuda_graph=True) == ["cuda_graph"]
    assert started(then, allow_config_change=True) == ["cuda_graph"]


def test_a_setting_that_the_older_version_lacked_is_changed_unless_it_has_its_default():
    then = config_to_dict(TrainConfig())
    del then["lookahead_steps"]
    assert started(then) == []
    assert started(then, lookahead_steps=5) == ["lookahead_steps"]


def test_without_a_compiler_kernels_are_refused_with_the_cure_or_given_up_with_leave():
    bare = dataclasses.replace(CPU, cpp_compiler=None)
    then = plan_on(**ADAM)
    assert then.winograd_convolutions and then.bf16_products
    assert then.fused_norms
    with pytest.raises(
        UserError,
        match=r"last\.ckpt: this machine cannot continue the run as planned: "
        r"winograd_convolutions and fused_norms: no C\+\+ compiler .*; install a C\+\+ compiler "
        r"\(g\+\+\), or resume with --allow-config-change",
    ):
        resumed(then, plan_on(bare, **ADAM), bare)
    plan, lines = resumed(then, plan_on(bare, **ADAM, allow_config_change=True), bare)
    assert not plan.winograd_convolutions and not plan.bf16_products
    assert not plan.fused_norms
    assert "bf16_products on -> off" in lines
    assert "fused_norms on -> off" in lines and "winograd_convolutions on -> off" in lines


def test_kernels_that_have_become_possible_stay_off():
    bare = dataclasses.replace(CPU, cpp_compiler=None)
    plan, _ = resumed(plan_on(bare, **FP32), plan_on(**FP32))
    assert not plan.winograd_convolutions
    assert not plan.fused_norms


def test_another_number_of_processes_is_refused_or_named():
    then = plan_on(world_size=2)
    with pytest.raises(
        UserError, match=r"it trained in 2 process\(es\), and there are 1 now; start 2 process"
    ):
        resumed(then, plan_on())
    plan, lines = resumed(then, plan_on(allow_config_change=True))
    assert (plan.world_size, plan.device_batch_size) == (1, plan.global_batch_size)
    assert "world_size 2 -> 1" in lines


def test_another_kind_of_device_is_refused_or_everything_is_decided_for_it():
    then = dataclasses.replace(plan_on(), device="cuda", precision="16-mixed", cuda_graph=True)
    with pytest.raises(UserError, match=r"it trained on cuda and this run is on cpu"):
        resumed(then, plan_on())
    fresh = plan_on(allow_config_change=True)
    plan, lines = resumed(then, fresh)
    assert plan == fresh
    assert "device cuda -> cpu" in lines


def test_threads_stay_since_they_round(monkeypatch):
    small = dataclasses.replace(CPU, cores=2)
    then, fresh = plan_on(), plan_on(small)
    plan, lines = resumed(then, fresh, small)
    assert plan.threads == 8
    assert "8 threads share 2 core(s)" in lines
    monkeypatch.setenv("OMP_THREAD_LIMIT", "2")
    with pytest.raises(UserError, match=r"with 8 threads and OMP_THREAD_LIMIT is 2; set .* to 8"):
        resumed(then, fresh, small)


def test_what_changes_no_number_is_decided_anew():
    then = plan_on(num_workers=3, resident_data=False, save_top_k=3)
    fresh = plan_on(num_workers=1, resident_data=False, save_top_k=1, val_check_interval=0.5)
    plan, _ = resumed(then, fresh)
    assert plan.num_workers == 1
    assert plan.save_top_k == 1
    assert plan.evaluation_interval_steps == fresh.evaluation_interval_steps


def test_changed_settings_win_and_the_choices_of_the_machine_stay():
    slower = dataclasses.replace(CPU, bf16_speed=1.09)
    fresh = plan_on(slower, lr=0.5, batch_size=128, bf16_products=False, allow_config_change=True)
    plan, _ = resumed(plan_on(bf16_products=False), fresh, slower, changed=("lr", "batch_size"))
    assert (plan.lr, plan.global_batch_size, plan.total_steps) == (0.5, 128, fresh.total_steps)
    assert plan.precision == "bf16-mixed"
    assert plan.threads == 8


@pytest.mark.parametrize("forged", [{"precision": "64"}, {"threads": 10**9}, {"compile_mode": "x"}])
def test_a_damaged_plan_is_one_line(forged):
    with pytest.raises(UserError, match=r"last\.ckpt: its plan is damaged"):
        resumed_plan(plan_on(), forged, CPU, changed=(), where="last.ckpt")


def test_every_choice_that_a_plan_makes_stays():
    """A setting that may be left to the plan is kept, or stands among those that change nothing."""
    auto = {key for key, field in TrainConfig.model_fields.items() if field.default == "auto"}
    then = plan_on(stem="imagenet", flip="none", crop_padding=2, lr=0.3, nesterov=False, threads=3)
    plan, _ = resumed(then, plan_on())
    fields = {field.name for field in dataclasses.fields(TrainPlan)}
    for key in (auto & fields) - FREE_FIELDS:
        assert getattr(plan, key) == getattr(then, key), key


def test_settings_that_may_differ_at_a_resumption_are_fields_that_do():
    fields = {field.name for field in dataclasses.fields(TrainPlan)}
    assert TRAJECTORY_FREE_KEYS & fields <= FREE_FIELDS <= fields


def test_processes_that_planned_differently_do_not_train_together(monkeypatch):
    slower = dataclasses.replace(CPU, bf16_speed=1.09, cpu_name="another CPU")
    other = plan_on(slower, model="resnet50").as_dict()
    monkeypatch.setattr(resuming, "gathered", lambda values: [values, other])
    with pytest.raises(UserError, match="precision is bf16-mixed and 32; set precision for all"):
        resuming.refuse_different_plans(plan_on(model="resnet50"))
    monkeypatch.setattr(resuming, "gathered", lambda values: [values, values])
    resuming.refuse_different_plans(plan_on())


TINY: dict[str, Any] = {
    "data": "digits", "model": "resnet10", "img_size": 8, "limit_train_images": 64,
    "batch_size": 16, "epochs": 2, "lr": 0.05, "threads": 1, "tensorboard": False, "name": "tiny",
    "accelerator": "cpu",
}  # fmt: skip


def plant_speed(monkeypatch: pytest.MonkeyPatch, speed: float) -> None:
    found = detect_hardware()
    planted = dataclasses.replace(
        found,
        instruction_sets=(*set(found.instruction_sets) - {"avx512"}, "avx512_bf16"),
        bf16_speed=speed,
    )
    monkeypatch.setattr(planned_run, "detect_hardware", lambda: planted)


def test_a_run_resumed_under_another_measurement_ends_bit_for_bit_as_without_a_stop(
    in_tmp_path, monkeypatch, capsys
):
    plant_speed(monkeypatch, 1.11)
    straight = main(**TINY, output_dir="straight")
    main(**TINY, stop_after_steps=3)
    plant_speed(monkeypatch, 1.09)
    result = main(**TINY)
    assert "precision bf16-mixed (a new run here: 32)" in capsys.readouterr().err
    assert straight.run_directory is not None
    assert result.run_directory is not None
    record = json.loads((result.run_directory / "run.json").read_text())
    assert record["plan"]["precision"] == "bf16-mixed"
    assert record["identity"]["training images"] == 64
    ours = load_file(result.run_directory / "weights.safetensors")
    for name, tensor in load_file(straight.run_directory / "weights.safetensors").items():
        assert torch.equal(ours[name], tensor), name


def test_a_checkpoint_of_an_older_version_has_its_plan_made_anew_and_says_so(in_tmp_path, capsys):
    stopped = main(**TINY, stop_after_steps=3)
    assert stopped.run_directory is not None
    path = stopped.run_directory / "checkpoints" / "last.ckpt"
    state = load_checkpoint(path)
    identity = state.pop("identity")
    del state["plan"]
    keys = ("training images", "batches an epoch")
    save_checkpoint(path, {**state, "data": {key: identity[key] for key in keys}})
    capsys.readouterr()
    assert main(**TINY).steps == 8
    shown = capsys.readouterr().err
    assert "the checkpoint is from an older version and holds no plan" in shown
    assert re.search(r"resuming .*version_0 at step 3 of 8", shown)
