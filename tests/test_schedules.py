import warnings

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from training_framework.errors import UserError
from training_framework.optimizers import SCHEDULES, build_schedule

OPTIONS = {"step": {"step_size": 7}, "multi_step": {"milestones": [5, 9]}}


def rates(build_scheduler, total_steps):
    """What torch's scheduler gives at each step of a run with a peak rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = build_scheduler(optimizer)
    values = [optimizer.param_groups[0]["lr"]]
    for _ in range(total_steps - 1):
        optimizer.step()
        with warnings.catch_warnings():
            # SequentialLR passes its children an epoch, which torch itself deprecated.
            warnings.simplefilter("ignore", UserWarning)
            scheduler.step()
        values.append(optimizer.param_groups[0]["lr"])
    return values


def ours(name, total_steps, **options):
    schedule = build_schedule(name, total_steps=total_steps, **options)
    return [schedule(step) for step in range(total_steps)]


def after_warmup(warmup_steps, build_scheduler):
    def build(optimizer):
        warmup = LinearLR(optimizer, 1 / (warmup_steps + 1), total_iters=warmup_steps)
        return SequentialLR(optimizer, [warmup, build_scheduler(optimizer)], [warmup_steps])

    return build


@pytest.mark.parametrize("final_fraction", [0.0, 0.1])
def test_cosine_equals_torchs(final_fraction):
    expected = rates(lambda o: CosineAnnealingLR(o, 40, eta_min=final_fraction), 40)
    assert ours("cosine", 40, final_fraction=final_fraction) == pytest.approx(expected)


def test_cosine_after_warmup_equals_torchs():
    expected = rates(after_warmup(8, lambda o: CosineAnnealingLR(o, 32)), 40)
    assert ours("cosine", 40, warmup_steps=8) == pytest.approx(expected)


@pytest.mark.parametrize("final_fraction", [0.0, 0.25])
def test_linear_after_warmup_equals_torchs(final_fraction):
    expected = rates(after_warmup(8, lambda o: LinearLR(o, 1, final_fraction, 32)), 40)
    actual = ours("linear", 40, warmup_steps=8, final_fraction=final_fraction)
    assert actual == pytest.approx(expected)


def test_constant_after_warmup_equals_torchs():
    expected = rates(after_warmup(8, lambda o: LinearLR(o, 1, 1, 1)), 20)
    assert ours("constant", 20, warmup_steps=8) == pytest.approx(expected)


@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_step_equals_torchs(gamma):
    expected = rates(lambda o: StepLR(o, 7, gamma), 40)
    assert ours("step", 40, step_size=7, gamma=gamma) == pytest.approx(expected)


def test_multi_step_equals_torchs_and_takes_milestones_in_any_order():
    expected = rates(lambda o: MultiStepLR(o, [5, 9, 30], 0.2), 40)
    assert ours("multi_step", 40, milestones=(30, 5, 9), gamma=0.2) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "at"), [("step", 7), ("multi_step", 5)])
def test_warmup_does_not_move_the_drops(name, at):
    plain = ours(name, 40, **OPTIONS[name])
    warmed = ours(name, 40, warmup_steps=3, **OPTIONS[name])
    assert warmed[3:] == plain[3:]
    assert (plain[at - 1], plain[at]) == (1, pytest.approx(0.1))


@pytest.mark.parametrize("total_steps", [4, 10, 37, 100])
def test_one_cycle_equals_torchs(total_steps):
    expected = rates(
        lambda o: OneCycleLR(o, 1.0, total_steps=total_steps, cycle_momentum=False), total_steps
    )
    assert ours("one_cycle", total_steps) == pytest.approx(expected)
    assert expected[-1] == pytest.approx(1 / 25 / 1e4)


def test_one_cycle_with_a_warmup_given_peaks_at_that_step_as_torchs_does():
    expected = rates(
        lambda o: OneCycleLR(o, 1.0, total_steps=40, pct_start=11 / 40, cycle_momentum=False), 40
    )
    actual = ours("one_cycle", 40, warmup_steps=10)
    assert actual == pytest.approx(expected)
    assert actual[10] == max(actual) == 1


def test_one_cycle_without_warmup_starts_at_the_peak():
    assert ours("one_cycle", 40, warmup_steps=0)[0] == 1


@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_one_cycle_of_a_few_steps_trains_at_the_peak_first(total_steps):
    assert ours("one_cycle", total_steps)[0] == 1


@pytest.mark.parametrize("warmup_steps", [1, 2, 5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_is_never_at_zero_and_rises_to_the_peak_at_its_own_length(name, warmup_steps):
    options = {"step": {"step_size": 50}, "multi_step": {"milestones": [50]}}.get(name, {})
    values = ours(name, 60, warmup_steps=warmup_steps, **options)
    climb = values[: warmup_steps + 1]
    assert climb[0] > 0
    assert climb == sorted(set(climb))
    assert climb[-1] == 1


@pytest.mark.parametrize("warmup_steps", [None, 0, 4, 19, 20])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_beyond_the_run_gets_the_last_value(name, warmup_steps):
    schedule = build_schedule(
        name, total_steps=20, warmup_steps=warmup_steps, **OPTIONS.get(name, {})
    )
    assert schedule(20) == schedule(21) == schedule(10_000) == schedule(19)
    assert 0 < schedule(19) <= 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_longer_than_the_run_names_both(name):
    with pytest.raises(UserError, match="warmup_steps 21 is longer than the run's 20 steps"):
        build_schedule(name, total_steps=20, warmup_steps=21, **OPTIONS.get(name, {}))


@pytest.mark.parametrize(
    ("name", "arguments", "fault"),
    [
        ("cosin", {}, "unknown scheduler 'cosin'; choose one of cosine, step"),
        ("cosine", {"total_steps": 0}, "the run has 0 steps"),
        ("cosine", {"warmup_steps": -1}, "warmup_steps is -1"),
        ("cosine", {"gamma": 0.1}, "cosine has no option 'gamma'; .*final_fraction"),
        ("step", {}, "step needs step_size"),
        ("step", {"step_size": 0}, "step_size of 0 steps"),
        ("multi_step", {}, "multi_step needs milestones"),
    ],
)
def test_a_bad_schedule_is_an_error(name, arguments, fault):
    with pytest.raises(UserError, match=fault):
        build_schedule(name, **{"total_steps": 20, **arguments})


def test_trapezoid_rises_holds_and_falls_in_straight_lines():
    rates = ours("trapezoid", 20, warmup_steps=4, decay_fraction=0.5, final_fraction=0.1)
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:11] == [1.0] * 7
    assert rates[11:] == pytest.approx([1 - 0.9 * k / 10 for k in range(1, 10)])


@pytest.mark.parametrize("option", ["decay_fraction", "final_fraction"])
def test_a_share_beyond_the_whole_is_refused(option):
    with pytest.raises(UserError, match=option):
        build_schedule("trapezoid", total_steps=10, **{option: 1.5})
