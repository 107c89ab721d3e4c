import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch

from training_framework.measure.compare.machine_load import MachineWatch, peak_memory
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
