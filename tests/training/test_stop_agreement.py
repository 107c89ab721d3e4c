import signal

import pytest
import torch

from training_framework.training.stopping import Decision, StopAgreement, StopSignals

CPU = torch.device("cpu")


def decide(agreement, signals, step, **changes):
    told = {"step_seconds": 0.5, "save_is_due": False, "at_logged_step": False, **changes}
    return agreement.decide(signals, step=step, **told)


@pytest.fixture
def stopped():
    signals = StopSignals()
    signals.received = signal.SIGTERM
    return signals


def test_one_process_decides_after_every_step(stopped):
    agreement = StopAgreement(world_size=1, device=CPU)
    assert decide(agreement, StopSignals(), 1) == Decision("", saves=False)
    assert decide(agreement, StopSignals(), 2, save_is_due=True) == Decision("", saves=True)
    assert decide(agreement, stopped, 3) == Decision("SIGTERM", saves=False)


def test_several_agree_about_every_two_seconds_and_at_logged_steps(stopped):
    agreement = StopAgreement(world_size=2, device=CPU)
    decide(agreement, StopSignals(), 1)
    stops = [step for step in range(2, 10) if decide(agreement, stopped, step).stopped_by]
    assert stops == [4, 8]
    assert decide(agreement, stopped, 9, at_logged_step=True).stopped_by == "SIGTERM"


def test_several_save_at_the_logged_step_after_one_was_due():
    agreement = StopAgreement(world_size=2, device=CPU)
    saves = [
        decide(
            agreement, StopSignals(), step, save_is_due=step == 3, at_logged_step=step % 5 == 0
        ).saves
        for step in range(1, 12)
    ]
    assert [step for step, saved in enumerate(saves, 1) if saved] == [5]
