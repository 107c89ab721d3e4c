import pytest
import torch

from training_framework.machine.memory_shortage import memory_shortage


def test_a_real_failure_of_the_cpu_allocator_is_known_and_keeps_its_number():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    said = memory_shortage(raised.value)
    assert said is not None
    assert said.startswith("DefaultCPUAllocator: can't allocate memory")
    assert str(2**60) in said and "Error code" not in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of "
                "79.15 GiB of which 3.69 MiB is free. Including non-PyTorch memory, this process "
                "has 79.14 GiB memory in use. Of the allocated memory 78.5 GiB is allocated"
            ),
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of "
            "79.15 GiB of which 3.69 MiB is free",
        ),
        (MemoryError(), "MemoryError"),
        (MemoryError("Unable to allocate 8. EiB"), "Unable to allocate 8. EiB"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), None),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`"),
            None,
        ),
        (torch.AcceleratorError("CUDA error: out of memory"), None),
        (RuntimeError("FIND was unable to find an engine to execute this computation"), None),
        (RuntimeError("NCCL error: ncclUnhandledCudaError, Cuda failure 2 'out of memory'"), None),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.99 GB)"), None),
    ],
)
def test_other_memories_are_known_too(error, said):
    found = memory_shortage(error)
    assert found == (str(error) if said is None else said)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("no memory of it")])
def test_other_errors_are_not_taken_for_it(error):
    assert memory_shortage(error) is None
