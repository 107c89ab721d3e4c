import os
import signal
import threading
import time

import pytest
import torch

from training_framework.training.stopping import (
    Decision,
    StopAgreement,
    StopRequested,
    StopSignals,
)

CPU = torch.device("cpu")
HANDLED = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", HANDLED)
def test_the_first_signal_asks_for_a_stop_and_the_next_meets_the_handler_before(number):
    seen = []
    before = signal.signal(number, lambda received, frame: seen.append(received))
    try:
        with StopSignals() as signals:
            assert signals.received is None
            os.kill(os.getpid(), number)
            assert signals.received == number
            assert seen == []
            os.kill(os.getpid(), number)
            assert seen == [number]
    finally:
        signal.signal(number, before)


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in HANDLED]
    with pytest.raises(RuntimeError, match="in between"), StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before[1]
        raise RuntimeError("in between")
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_a_hangup_that_is_ignored_stays_ignored_as_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_nothing_is_handled():
    before = signal.getsignal(signal.SIGTERM)
    inside = []

    def work() -> None:
        with StopSignals() as signals:
            inside.append((signal.getsignal(signal.SIGTERM), signals.received))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [(before, None)]


def test_a_signal_cuts_a_call_short_that_allows_it():
    def wait() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    start = time.monotonic()
    with StopSignals() as signals:
        with pytest.raises(StopRequested):
            signals.interruptibly(wait)
        assert signals.received == signal.SIGTERM
    assert time.monotonic() - start < 10


def test_a_signal_before_a_call_keeps_it_from_beginning():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopRequested):
            signals.interruptibly(pytest.fail)


def test_a_signal_cuts_nothing_else_short():
    with StopSignals() as signals:
        assert signals.interruptibly(lambda: 3) == 3
        os.kill(os.getpid(), signal.SIGTERM)  # raises nothing here
        assert signals.received == signal.SIGTERM


@pytest.mark.parametrize("number", HANDLED)
def test_a_second_signal_ends_a_process_at_once(forks, number):
    program = (
        "import os, sys, time\n"
        "from training_framework.training.stopping import StopSignals\n"
        "with StopSignals() as signals:\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    print(signals.received.name, flush=True)\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    time.sleep(60)\n"
    )
    done = forks.run("-c", program)
    assert done.stdout.strip() == signal.Signals(number).name
    assert done.returncode == -number, done.stderr


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


def test_before_the_first_row_several_agree_by_the_time_between_agreements(monkeypatch, stopped):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    agreement = StopAgreement(world_size=2, device=CPU)
    asked = []
    for step in range(1, 12):
        clock[0] += 60.0 if step == 1 else 0.5  # the first one compiles
        asked.append(bool(decide(agreement, stopped, step, step_seconds=None).stopped_by))
    assert [step for step, was in enumerate(asked, 1) if was] == [1, 2, 4, 8]


def test_several_save_at_the_logged_step_after_one_was_due():
    agreement = StopAgreement(world_size=2, device=CPU)
    saves = [
        decide(
            agreement, StopSignals(), step, save_is_due=step == 3, at_logged_step=step % 5 == 0
        ).saves
        for step in range(1, 12)
    ]
    assert [step for step, saved in enumerate(saves, 1) if saved] == [5]
