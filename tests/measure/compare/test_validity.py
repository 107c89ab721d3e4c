import pytest

from training_framework.measure.compare.result import Measurement, Ratio, VariantFacts
from training_framework.measure.compare.validity import (
    MARKS,
    control_marks,
    pair_marks,
    variant_marks,
    work_marks,
)

FACTS = VariantFacts(
    device="cpu",
    device_name="a processor",
    dataset="synthetic",
    train_images=64,
    image_size=8,
    images_per_step=8,
    flops_per_image=1e6,
    peak_flops=1e11,
    peak_flops_source="measured",
    plan={},
    build_seconds=1.0,
    warmup_step_seconds=[0.5, 0.1],
)


def measurements(rounds: int = 6, **changes) -> list[Measurement]:
    values = {
        "seconds": 0.6,
        "steps": 6,
        "images": 48,
        "step_seconds": [0.1] * 6,
        "cpu_seconds": 0.6,
        "other_cpu_share": 0.01,
        "peak_memory_bytes": 1000,
        **changes,
    }
    return [Measurement(round=number, **values) for number in range(rounds)]


def names(marks) -> list[str]:
    assert all(mark.name in MARKS for mark in marks)
    return [mark.name for mark in marks]


def test_quiet_samples_bear_no_mark():
    assert variant_marks(measurements(), [80.0] * 6) == []


@pytest.mark.parametrize(
    ("changes", "samples", "mark"),
    [
        ({"new_graphs": 1}, [80.0] * 6, "recompiled"),
        ({"other_cpu_share": 0.3}, [80.0] * 6, "busy machine"),
        ({}, [60, 70, 80, 90, 100, 110], "wide spread"),
        ({"step_seconds": [0.2, 0.2, 0.1, 0.1, 0.1, 0.1]}, [80.0] * 6, "warm-up"),
        ({}, [80.0, None] * 3, "target missed"),
    ],
)
def test_each_fault_of_the_samples_is_marked(changes, samples, mark):
    assert names(variant_marks(measurements(**changes), samples)) == [mark]


def test_half_the_images_are_other_work_whatever_the_plan_says():
    half = measurements(images=24)
    marks = work_marks(FACTS, half, FACTS, measurements(), ())
    assert names(marks) == ["different work"]
    assert "4 against 8" in marks[0].detail
    assert work_marks(FACTS, half, FACTS, measurements(), ("images_per_step",)) == []


@pytest.mark.parametrize(
    ("change", "kind"),
    [({"flops_per_image": 2e6}, "flops"), ({"image_size": 16}, "image_size"),
     ({"dataset": "digits"}, "dataset")],
)  # fmt: skip
def test_other_images_or_another_network_are_other_work(change, kind):
    other = FACTS.model_copy(update=change)
    assert names(work_marks(FACTS, measurements(), other, measurements(), ()))
    assert work_marks(FACTS, measurements(), other, measurements(), (kind,)) == []


def ratio(low, high, pairs=10) -> Ratio:
    return Ratio(variant="c", against="a", median=1.0, low=low, high=high, pairs=pairs)


def test_a_control_that_differs_is_marked_and_so_is_its_absence():
    assert control_marks(ratio(0.98, 1.02)) == []
    assert names(control_marks(ratio(1.01, 1.04))) == ["control"]
    assert names(control_marks(ratio(0.8, 1.2))) == ["control"]
    assert names(control_marks(ratio(0.99, 1.01, pairs=5))) == ["few pairs"]
    assert names(control_marks(None)) == ["control"]
    assert names(pair_marks([ratio(1.4, 1.5), ratio(1.2, 1.3, pairs=3)])) == ["few pairs"]
    assert pair_marks([ratio(1.4, 1.5)]) == pair_marks([]) == []
