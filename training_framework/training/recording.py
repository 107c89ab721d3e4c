"""Record work as a CUDA graph, and say why that failed."""

from collections.abc import Callable

import torch

from training_framework.errors import one_line

__all__ = ["CudaRecord", "Record", "reason_of", "root_cause"]

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Records the given work, which need not run yet; returns a function that runs it."""


class CudaRecord:
    """Records CUDA graphs that share memory, since they are always replayed in the same order."""

    def __init__(self) -> None:
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the work. Waits for the device.

        Raises:
            RuntimeError: The work does what a graph cannot hold; `root_cause` finds what. Nothing
                of it has run.
        """
        graph = torch.cuda.CUDAGraph()
        pool = self._graphs[0].pool() if self._graphs else None
        with (
            # If the recording fails, torch.cuda.graph leaves its own stream as the current one.
            torch.cuda.stream(torch.cuda.current_stream()),
            # Other threads may meanwhile pin memory for the loader or copy a checkpoint.
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            work()
        self._graphs.append(graph)
        return graph.replay


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
