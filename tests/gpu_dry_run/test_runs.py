"""Whole runs on a GPU that is not there: all that a plan can choose, and every switch."""

import pytest
from findings import findings

H200 = {"name": "NVIDIA H200", "capability": (9, 0), "memory_gib": 140}
V100 = {"name": "Tesla V100-SXM2-16GB", "capability": (7, 0), "memory_gib": 16}
GTX_1080 = {"name": "NVIDIA GeForce GTX 1080", "capability": (6, 1), "memory_gib": 8}
GTX_1650 = {"name": "NVIDIA GeForce GTX 1650", "capability": (7, 5), "memory_gib": 4}
EVERY_AUGMENTATION = {
    "mixup": 0.2, "cutmix": 1.0, "cutout": 4, "random_erasing": 0.2, "flip": "alternating",
}  # fmt: skip
FROM_HOST = {"resident_data": False, "num_workers": 0}

RECORDED = {"cuda_graph": True, "batch_size": 256}  # the fourth of five steps is recorded
RUNS = {
    "as planned": {},
    "recorded, average and augmentations": {
        **RECORDED, "ema_decay": 0.9, **EVERY_AUGMENTATION,
    },
    "recorded, clipped": {**RECORDED, "optimizer": "adamw", "grad_clip_val": 1.0},
    "recorded, compiled, from the host": {**RECORDED, "compile": True, **FROM_HOST},
    "accumulated": {"accumulate_grad_batches": 2, "batch_size": 128, "ema_decay": 0.9},
    "fp16, sgd": {"precision": "16-mixed"},
    "little memory, fp32": {
        "activation_checkpointing": True, "auto_micro_batch": True, "precision": "32",
    },
    "two epochs, synthetic": {
        "data": "synthetic", "epochs": 2, "synthetic_train_images": 512,
        "synthetic_val_images": 128, "batch_size": 256, **EVERY_AUGMENTATION,
    },
}  # fmt: skip
FURTHER_RUNS = {
    "from the host": FROM_HOST,
    "not compiled or fused": {"compile": False, "fused_optimizer": False},
    "recorded": RECORDED,
    "recorded, from the host": {**RECORDED, **FROM_HOST},
    "recorded, adam, fp32": {**RECORDED, "optimizer": "adam", "precision": "32"},
    "clipped": {"optimizer": "adamw", "grad_clip_val": 1.0},
    "compiled": {"compile": True},
    "fp16, adamw, clipped": {
        "precision": "16-mixed", "optimizer": "adamw", "grad_clip_val": 1.0,
    },
    "the other way round": {
        "channels_last": False, "deterministic": True, "share_early_weights": True,
        "zero_init_last_norm": True, "label_smoothing": 0.1, "optimizer": "adam",
        "pin_memory": False,
    },
    "bottlenecks": {"model": "resnet50", **RECORDED},
}  # fmt: skip


def check_run(dry_run, settings):
    report = dry_run(settings)
    assert report.plan["device"] == "cuda"
    assert report.steps == report.epochs * report.steps_per_epoch
    assert findings(report) == []
    if settings.get("cuda_graph"):
        assert len(report.recorded) == 2  # forward and backward, and the update
        assert set(report.replayed.values()) == {2}
        optimizer = settings.get("optimizer", "sgd")
        recorded = {name for name, is_recorded, _ in report.fused if is_recorded}
        assert recorded == {f"aten._fused_{optimizer}_.tensor_lr"}
    assert len(report.compiled) == bool(settings.get("compile"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_whole_and_its_steps_never_wait(dry_run, name):
    check_run(dry_run, RUNS[name])


@pytest.mark.long
@pytest.mark.parametrize("name", FURTHER_RUNS)
def test_further_runs_are_whole_and_their_steps_never_wait(dry_run, long, name):
    if not long:
        pytest.skip("with --long")
    check_run(dry_run, FURTHER_RUNS[name])


@pytest.mark.parametrize("gpu", [V100, GTX_1650], ids=lambda gpu: gpu["name"])
def test_what_is_planned_for_an_older_gpu_runs(dry_run, gpu):
    report = dry_run(gpu=gpu)
    assert findings(report) == []
    assert report.plan["precision"] == ("16-mixed" if gpu is V100 else "32")


def test_a_long_run_compiles_where_it_can(dry_run):
    settings = {"epochs": 1000, "stop_after_steps": 2}
    report = dry_run(settings, gpu=H200)
    assert findings(report) == []
    assert report.compiled == ["reduce-overhead"]
    old = dry_run(settings, gpu=GTX_1080)
    assert findings(old) == []
    assert old.compiled == []


TO_CHANNELS_LAST = {"settings": {"channels_last": False, "batch_size": 256},
                    "resumed_with": {"channels_last": True}}  # fmt: skip


def test_a_run_resumed_in_another_memory_layout_is_whole(dry_run):
    report = dry_run(**TO_CHANNELS_LAST)
    assert report.plan["channels_last"]
    assert report.steps == 5
    assert findings(report) == []
    kept = ("training_framework.training.state:TrainState._load_optimizer",
            "value.stride() != parameter.stride()", "False")  # fmt: skip
    found = findings(dry_run(**TO_CHANNELS_LAST, plants=(kept,)))
    assert "the optimizer's state has another layout than the weights in step 4" in found


def test_a_logged_row_waits_once_and_a_save_once(dry_run):
    waits = dry_run({**FROM_HOST, "batch_size": 256, "log_every_n_steps": 2}).waits
    between = [where.split()[-1] for _, where, when in waits if when == "between steps"]
    rows = ["read_over_processes"] * 3  # after steps 2, 4 and 5
    assert between == [*rows, "read"]  # of the order of the epoch's samples
    assert len([where for _, where, when in waits if when == "save"]) == 1
    assert len([where for _, where, when in waits if when == "evaluation"]) == 1
