import multiprocessing
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch

from training_framework.machine import hardware
from training_framework.machine.load import MachineWatch, neighbours_note
from training_framework.machine.memory import peak_memory
from training_framework.measure.compare.result import Measurement
from training_framework.measure.compare.validity import variant_marks


def spin(until: float) -> None:
    while time.time() < until:
        pass


def test_own_and_others_use_of_the_cores_are_told_apart():
    watch = MachineWatch()
    watch.start()
    own_start = time.process_time()
    spin(time.time() + 0.3)
    load = watch.stop()
    own = time.process_time() - own_start
    assert abs(load.cpu_seconds - own) < 0.05
    assert 0 <= load.other_cpu_share <= 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_planted_load_makes_the_machine_busy_and_is_marked():
    orphan = """
import os, time
if os.fork():
    os._exit(0)  # its child belongs to nobody here any more
end = time.time() + 1.5
while time.time() < end:
    pass
"""
    subprocess.run([sys.executable, "-c", orphan], check=True, timeout=30)
    watch = MachineWatch()
    watch.start()
    time.sleep(0.6)
    load = watch.stop()
    assert load.other_cpu_share > 0.5 / (os.cpu_count() or 1)
    measurement = Measurement(
        round=0,
        seconds=0.6,
        steps=1,
        images=1,
        cpu_seconds=load.cpu_seconds,
        other_cpu_share=load.other_cpu_share,
        peak_memory_bytes=1,
    )
    if (os.cpu_count() or 1) <= 8:  # on more cores, one busy one is below the mark's 5%
        assert [mark.name for mark in variant_marks([measurement], [1.0])] == ["busy machine"]


def test_children_count_as_this_process_and_sleeping_as_nobody():
    context = multiprocessing.get_context("fork")
    watch = MachineWatch()
    watch.start()
    child = context.Process(target=spin, args=(time.time() + 0.4,))
    child.start()
    time.sleep(0.5)
    child.join()
    load = watch.stop()
    assert 0.05 < load.cpu_seconds < 0.5


def test_peak_memory_is_at_least_what_was_touched():
    before = peak_memory(torch.device("cpu"))
    block = bytearray(before // 2 + 2**27)
    with_block = peak_memory(torch.device("cpu"))
    del block
    assert with_block > before
    # The kernel keeps this count to within some pages a core.
    assert peak_memory(torch.device("cpu")) > 0.99 * with_block


def test_a_busy_neighbour_is_told_with_what_it_costs_and_what_to_do():
    assert neighbours_note(0.1, cores=2, threads=2) == ""
    note = neighbours_note(0.5, cores=2, threads=2)
    assert note.startswith("other processes keep 1.0 of the 2 cores busy, ")
    assert note.endswith("; end them or set threads to 1")
    assert neighbours_note(0.5, cores=8, threads=8).endswith("set threads to 4")
    assert neighbours_note(1.0, cores=2, threads=1).endswith("end them to train faster")


def test_the_machine_is_seen_to_be_busy(monkeypatch):
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"])]
    try:
        # The first look in a process takes longer, so the second is the one whose time counts.
        monkeypatch.setattr(hardware, "MachineWatch", lambda: others_are_neighbours(neighbours))
        hardware.detect_hardware()
        start = time.perf_counter()
        seen = hardware.detect_hardware().other_cpu_share
        assert time.perf_counter() - start < 2
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    assert seen > 0.2 / (os.cpu_count() or 1)


def others_are_neighbours(neighbours: list[subprocess.Popen[bytes]]) -> MachineWatch:
    """A watch to which these children of this process count as others."""
    watch = MachineWatch()
    watch._process = psutil.Process()
    watch._own_seconds = lambda: sum(watch._process.cpu_times()[:2])  # type: ignore[method-assign]
    return watch


def test_several_processes_of_one_training_are_no_neighbours(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert hardware.detect_hardware().other_cpu_share == 0.0
