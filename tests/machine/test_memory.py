import platform
import subprocess
import sys

import pytest

from training_framework.machine import memory as memory_reuse

SCRIPT = """
import sys, resource, torch
from training_framework.machine.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory() and keep_freed_memory()
def step():
    tensors = [torch.ones(2**23) for _ in range(4)]
for _ in range(5): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(mode):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
def test_steps_take_no_new_pages_once_they_may_keep_theirs():
    assert new_pages("keep") < 0.5 * new_pages("give back")


def test_other_allocators_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    memory_reuse.keep_freed_memory.cache_clear()
    assert not memory_reuse.can_keep_freed_memory()
    assert not memory_reuse.keep_freed_memory()
    memory_reuse.keep_freed_memory.cache_clear()
