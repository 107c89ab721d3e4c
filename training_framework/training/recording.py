"""Record work as a CUDA graph, and say why that failed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from training_framework.errors import one_line

__all__ = ["CudaRecord", "Record", "on_stream", "reason_of", "root_cause"]

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Records the given work, which need not run yet; returns a function that runs it."""


class CudaRecord:
    """Records CUDA graphs that share memory, since they are always replayed in the same order.

    A graph and its memory live as long as the function that replays it.

    Args:
        stream: What the work is recorded on; None: a stream of PyTorch's.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._stream = stream
        self._pool: Any = None

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the work. Waits for the device.

        Raises:
            RuntimeError: The work does what a graph cannot hold; `root_cause` finds what. Nothing
                of it has run.
        """
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with (
                # If the recording fails, torch.cuda.graph leaves its own stream as the current one.
                torch.cuda.stream(torch.cuda.current_stream()),
                # Other threads may meanwhile pin memory for the loader, copy a checkpoint, or ask
                # whether NCCL has ended what came before.
                torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=self._stream,
                    capture_error_mode="thread_local",
                ),
            ):
                work()
        except BaseException:
            _end_allocation(self._pool)
            raise
        return graph.replay


def _end_allocation(pool: Any) -> None:
    """Tell PyTorch's allocator that a recording into `pool` has ended.

    Where the device reports that a recording is not valid, some versions of PyTorch (2.11 among
    them) forget to. The allocator then takes all that follows for recorded: it never frees memory
    that two streams have used, such as the loader's batches, and torch.cuda.empty_cache fails an
    assertion (PyTorch's pull request 180395).
    """
    with suppress(RuntimeError):  # this PyTorch has done it
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Launch on another stream, after what the current one has and before what it gets."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def root_cause(error: BaseException) -> BaseException:
    """The first of the errors that led to this one.

    A failed recording raises once more when it ends, and only says that it is not valid.
    """
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def reason_of(error: BaseException) -> str:
    """The first line of an error's message."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0])
