import io
import json
import os
import signal

import psutil
import pytest

from training_framework.errors import UserError
from training_framework.measure.compare import timing
from training_framework.measure.compare.comparison import Comparison
from training_framework.measure.compare.experiment import CONTROL, Experiment
from training_framework.measure.compare.result import load_result
from training_framework.measure.compare.table import result_lines
from training_framework.measure.compare.workers import InlineWorker, ProcessWorker, VariantFailure
from training_framework.runs import record as run_record
from training_framework.training import parts

pytestmark = pytest.mark.usefixtures("narrow_networks")

TINY = {
    "data": "synthetic",
    "model": "resnet10",
    "img_size": 8,
    "num_classes": 4,
    "synthetic_train_images": 36,
    "synthetic_val_images": 12,
    "batch_size": 8,
    "lr": 0.01,
    "precision": "32",
    "accelerator": "cpu",
    "threads": 1,
}


@pytest.fixture(autouse=True)
def _cheap_costs(monkeypatch):
    monkeypatch.setattr(parts, "training_flops_per_image", lambda *_: 1e6)
    monkeypatch.setattr(timing, "measure_peak_flops", lambda *_: (1e11, "measured"))
    monkeypatch.setattr(run_record, "measure_peak_flops", lambda *_: (1e11, "measured"))


def experiment(**changes) -> Experiment:
    fields = {
        "name": "tiny",
        "base": TINY,
        "variants": [{"name": "a"}, {"name": "b", "overrides": {"channels_last": False}}],
        "rounds": 2,
        "steps": 3,
        "warmup_steps": 1,
        "patience": 0.0,
        "isolation": "shared",
    }
    return Experiment(**{**fields, **changes})


class Recorder:
    """Inline workers that note whose turn it was, and can break or interrupt one."""

    def __init__(self, break_at=None, interrupt_at=None):
        self.turns = []
        self.break_at = break_at
        self.interrupt_at = interrupt_at

    def __call__(self, variant, config, order):
        recorder = self

        class Worker(InlineWorker):
            def sample(self, round_number):
                turn = (variant.name, round_number)
                recorder.turns.append(turn)
                if turn == recorder.break_at:
                    raise VariantFailure("out of memory: planted")
                if turn == recorder.interrupt_at:
                    os.kill(os.getpid(), signal.SIGINT)
                return super().sample(round_number)

        return Worker(config, order)


def compare(path, exp=None, **options):
    exp = experiment() if exp is None else exp
    return Comparison(
        exp, path=path / "r.json", command="repeat me", stream=io.StringIO(), **options
    )


def test_variants_take_turns_there_and_back_with_the_control_at_the_end(tmp_path):
    recorder = Recorder()
    result = compare(tmp_path, open_worker=recorder).run()
    names = [name for name, _ in recorder.turns]
    assert names == ["a", "b", CONTROL, CONTROL, "b", "a"]
    assert result.complete
    assert {(r.variant, r.against, r.pairs) for r in result.ratios} == {
        ("b", "a", 2), (CONTROL, "a", 2),
    }  # fmt: skip
    assert load_result(tmp_path / "r.json").model_dump_json() == result.model_dump_json()
    assert result.command == "repeat me"
    assert result.environment["versions"]["torch"]


def test_variants_start_anew_as_often_as_asked(tmp_path):
    opened = []

    def open_worker(variant, config, order):
        opened.append(variant.name)
        return InlineWorker(config, order)

    exp = experiment(variants=[{"name": "a"}], rounds=3, steps=1, rounds_per_process=2)
    result = compare(tmp_path, exp, open_worker=open_worker).run()
    assert opened == ["a", CONTROL, CONTROL, "a"]  # none is always the first
    assert [len(variant.samples) for variant in result.variants] == [3, 3]


def test_a_variant_with_half_the_images_is_marked_in_the_table(tmp_path):
    variants = [{"name": "a"}, {"name": "half", "overrides": {"batch_size": 4}}]
    result = compare(tmp_path, experiment(variants=variants)).run()
    marks = {variant.name: variant.marks for variant in result.variants}
    assert "different work" in marks["half"]
    assert "different work" not in marks["a"] + marks[CONTROL]
    lines = result_lines(result)
    row = next(line for line in lines if line.startswith("| half"))
    assert row.rstrip("| ").endswith("D")
    assert max(len(line) for line in lines) <= 80


def test_what_this_machine_lacks_is_named_and_not_estimated(tmp_path, monkeypatch):
    import dataclasses

    from training_framework.machine.hardware import detect_hardware
    from training_framework.measure.compare import comparison

    hardware = dataclasses.replace(detect_hardware(), accelerators=(), instruction_sets=())
    monkeypatch.setattr(comparison, "detect_hardware", lambda: hardware)
    variants = [
        {"name": "a"},
        {"name": "gpu", "overrides": {"accelerator": "gpu"}, "needs": ["gpu"]},
        {"name": "half", "overrides": {"precision": "bf16-mixed"}, "needs": ["bf16"]},
    ]
    result = compare(tmp_path, experiment(variants=variants, rounds=1)).run()
    by_name = {variant.name: variant for variant in result.variants}
    assert by_name["gpu"].unavailable == "no GPU found"
    assert "bf16" in by_name["half"].unavailable
    assert by_name["gpu"].samples == [] and by_name["gpu"].median is None
    assert [r.variant for r in result.ratios] == [CONTROL]
    assert "- gpu: not available here: no GPU found" in result_lines(result)


def test_a_variant_that_fails_later_keeps_its_rounds_and_the_others_go_on(tmp_path):
    recorder = Recorder(break_at=("b", 1))
    result = compare(tmp_path, open_worker=recorder).run()
    b = result.variants[1]
    assert b.unavailable == "out of memory: planted"
    assert len(b.samples) == 1
    assert len(result.variants[0].samples) == 2
    assert result.ratio_of("b").pairs == 1


def test_a_baseline_that_cannot_run_is_an_error(tmp_path):
    broken = experiment(variants=[{"name": "a", "overrides": {"accelerator": "gpu"}}])
    comparison = compare(tmp_path, broken)
    if comparison._hardware.usable:
        pytest.skip("a GPU is here")
    with pytest.raises(UserError, match=r"the baseline 'a' cannot run: accelerator: gpu"):
        comparison.run()
    assert not (tmp_path / "r.json").exists()


def test_an_interrupted_comparison_keeps_its_rounds_and_goes_on(tmp_path):
    first = compare(tmp_path, experiment(rounds=3), open_worker=Recorder(interrupt_at=("b", 1)))
    partial = first.run()
    assert first.stopped_by == "SIGINT"
    assert (partial.rounds, partial.complete) == (1, False)
    kept = load_result(tmp_path / "r.json")
    recorder = Recorder()
    resumed = Comparison.resume(tmp_path / "r.json", open_worker=recorder, stream=io.StringIO())
    result = resumed.run()
    assert {number for _, number in recorder.turns} == {1, 2}
    assert (result.rounds, result.complete) == (3, True)
    assert result.variants[0].measurements[0] == kept.variants[0].measurements[0]
    assert result.ratios[0].pairs == 2  # the first start's processes, and the second one's


def test_rounds_of_another_machine_cannot_be_resumed(tmp_path):
    compare(tmp_path, experiment(rounds=1), open_worker=Recorder()).run()
    path = tmp_path / "r.json"
    content = json.loads(path.read_text())
    content["environment"]["cpu_name"] = "another processor"
    path.write_text(json.dumps(content))
    with pytest.raises(
        UserError,
        match=r"cannot resume: the environment changed: cpu_name: 'another processor' then",
    ):
        Comparison.resume(path, rounds=2)


def test_whole_runs_are_timed_to_the_accuracy_that_all_reach(tmp_path):
    runs = experiment(
        measure="accuracy",
        target_accuracy="equal",
        seeds=[5],
        rounds=1,
        base={**TINY, "epochs": 2},
        variants=[{"name": "a"}, {"name": "slow", "overrides": {"lr": 1e-6}}],
        control=False,
    )
    result = compare(tmp_path, runs).run()
    a, slow = result.variants
    assert a.measurements[0].seed == slow.measurements[0].seed == 5
    curves = [variant.measurements[0].curve for variant in (a, slow)]
    assert [len(curve) for curve in curves] == [2, 2]
    target = min(max(acc1 for _, acc1 in curve) for curve in curves)
    assert result.target_accuracy == target
    for variant, curve in zip((a, slow), curves, strict=True):
        assert variant.samples == [next(s for s, acc1 in curve if acc1 >= target)]
    assert result.ratios[0].median == pytest.approx(a.samples[0] / slow.samples[0])
    assert f"s to {target:.1f}%" in "\n".join(result_lines(result))


def test_a_missed_target_is_marked_and_forms_no_pair(tmp_path):
    runs = experiment(
        measure="accuracy",
        target_accuracy=100.0,
        rounds=1,
        base={**TINY, "epochs": 1, "lr": 1e-6},
        variants=[{"name": "a"}],
        control=False,
    )
    result = compare(tmp_path, runs).run()
    assert result.variants[0].samples == [None]
    assert "target missed" in result.variants[0].marks


def test_a_process_of_its_own_sleeps_between_its_turns_and_ends_with_its_input():
    exp = experiment(isolation="process")
    order = {"measure": "steps", "steps": 2, "seconds": 1.0, "warmup_steps": 1, "seeds": ()}
    worker = ProcessWorker(
        exp.config_of(exp.variants[0]), order, environment={"OMP_NUM_THREADS": "1"}
    )
    try:
        assert worker.sample(0).images == 16
        process = psutil.Process(worker._process.pid)
        assert "OMP_NUM_THREADS" in process.environ()
        before = sum(process.cpu_times()[:2])
        psutil.Process().cpu_percent(interval=0.3)
        assert sum(process.cpu_times()[:2]) - before <= 0.02
        assert worker.sample(1).round == 1
    finally:
        worker.close()
    assert worker._process.returncode == 0


def test_a_process_that_dies_or_cannot_build_says_why():
    exp = experiment(isolation="process")
    order = {"measure": "steps", "steps": 2, "seconds": 1.0, "warmup_steps": 1, "seeds": ()}
    config = exp.config_of(exp.variants[0])
    with pytest.raises(VariantFailure, match=r"its process ended with 3: no such luck"):
        ProcessWorker(config, order, environment={}, program=[
            "-c", "import sys; print('no such luck', file=sys.stderr); sys.exit(3)"
        ])  # fmt: skip
