"""Kernels in several processes and threads at once: each has memory of its own."""

import concurrent.futures
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from training_framework.kernels.norm import activated_norm
from training_framework.kernels.scratch import scratch_memory, thread_count
from training_framework.kernels.winograd import winograd_convolution
from training_framework.kernels.winograd_convolution import WinogradConv2d

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the kernels need a C++ compiler"
)
ROUNDS = 8


def gradients(output, *inputs):
    return torch.autograd.grad(output.square().sum(), inputs)


def largest_error(seed):
    """Of many convolutions and norms: the largest difference from torch, over the largest value."""
    torch.manual_seed(seed)
    weight = torch.randn(64, 64, 3, 3) / 24
    weight.requires_grad_()
    errors = []
    for _ in range(ROUNDS):
        images = torch.randn(4, 64, 16, 16, requires_grad=True)
        output, expected = (
            winograd_convolution(images, weight, 1),
            F.conv2d(images, weight, padding=1),
        )
        ones, zeros = torch.ones(64), torch.zeros(64)
        pairs = [
            (output, expected),
            *zip(
                gradients(output, images, weight), gradients(expected, images, weight), strict=True
            ),
            (
                activated_norm(images, ones, zeros, None, 1e-5, "none")[0],
                F.batch_norm(images, None, None, training=True),
            ),
        ]
        errors += [((one - other).abs().max() / other.abs().max()).item() for one, other in pairs]
    return max(errors)


def alone_with_one_thread(seed):
    torch.set_num_threads(1)
    return largest_error(seed)


def exit_status_of_a_fork(work):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() < 1e-4 else 2
        finally:
            os._exit(status)
    return child


def wait_for_all(children):
    # A child that hangs is killed by the test's own time limit, together with this process.
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@needs_compiler
def test_forked_processes_that_convolve_at_once_do_not_write_into_one_memory():
    torch.set_num_threads(1)
    assert largest_error(0) < 1e-4  # the memory is there before the fork
    children = [exit_status_of_a_fork(lambda s=s: largest_error(s)) for s in range(3)]
    assert largest_error(9) < 1e-4
    assert wait_for_all(children) == [0] * 3


FORK_WITH_THREADS = """
import torch
from test_scratch import exit_status_of_a_fork, largest_error, wait_for_all
torch.set_num_threads(2)
assert largest_error(0) < 1e-4
def work():
    assert torch.get_num_threads() == 1
    return largest_error(1)
assert wait_for_all([exit_status_of_a_fork(work) for _ in range(2)]) == [0, 0]
assert torch.get_num_threads() == 2 and largest_error(2) < 1e-4
"""

POOL = """
import multiprocessing, sys, torch
from test_scratch import alone_with_one_thread, largest_error
if __name__ == "__main__":
    torch.set_num_threads(2)
    largest_error(0)
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        assert max(pool.map(alone_with_one_thread, range(3))) < 1e-4
"""


def environment():
    """Of programs that import this file and may use two threads."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path.cwd())])
    return {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": path}


@needs_compiler
def test_a_fork_after_kernels_with_two_threads_goes_on_with_one_and_does_not_hang(forks):
    done = forks.run("-W", "error", "-c", FORK_WITH_THREADS, env=environment())
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_a_pool_of_forks_computes_the_right_numbers(forks):
    done = forks.run("-W", "error", "-c", POOL, "fork", env=environment())
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_pool_of_new_processes_computes_the_right_numbers(method, long, tmp_path):
    if method == "forkserver" and not long:
        pytest.skip("by --long; a process that is started anew is tested by the other method")
    script = tmp_path / "script.py"
    script.write_text(POOL)
    command = [sys.executable, "-W", "error", str(script), method]
    subprocess.run(command, env=environment(), timeout=150, check=True)


class Features(Dataset):
    """Runs a network with the kernels in the worker, as some users do."""

    def __init__(self):
        torch.manual_seed(0)
        self.network = WinogradConv2d(16, 16, 3, padding=1, bias=False).requires_grad_(False)

    def __len__(self):
        return 24

    def image(self, index):
        return torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(index))

    def __getitem__(self, index):
        return index, self.network(self.image(index))[0]


@needs_compiler
def test_loader_workers_may_run_a_network_with_the_kernels():
    torch.set_num_threads(2)
    data = Features()
    data[0]
    loader = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork")
    for indices, features in loader:
        images = torch.cat([data.image(int(index)) for index in indices])
        torch.testing.assert_close(
            features, F.conv2d(images, data.network.weight, padding=1), rtol=1e-4, atol=1e-5
        )


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_python_threads_that_convolve_at_once_do_not_disturb_each_other(threads):
    torch.set_num_threads(threads)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert max(pool.map(largest_error, range(3))) < 1e-4


def test_each_thread_has_scratch_of_its_own_and_keeps_it():
    mine, others = [scratch_memory(100), scratch_memory(50)], []
    thread = threading.Thread(target=lambda: others.append(scratch_memory(100)))
    thread.start()
    thread.join()
    assert mine[0] == mine[1] != others[0]
    assert mine[0] % 64 == 0


def test_scratch_that_cannot_be_had_reads_like_torchs_own_shortage():
    for floats in (2**50, 2**70):
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            scratch_memory(floats)
    assert scratch_memory(10)


def test_kernels_take_the_number_of_threads_from_torch():
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert thread_count() == threads
