"""The process of one trial: `compare`'s worker, with limits on its time and memory.

`python -m training_framework.measure.tune.trial_worker SECONDS BYTES`; 0 bytes mean no limit.
"""

import os
import sys
import threading
import time

import psutil

from training_framework.measure.compare import worker

__all__ = ["main"]

EXIT_OVER_LIMIT = 3
SECONDS_BETWEEN_LOOKS = 0.05


def main() -> None:
    """Answer requests from standard input until it ends or a limit is reached."""
    seconds, limit_bytes = float(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_watch, args=(seconds, limit_bytes), daemon=True).start()
    worker.main()


def _watch(seconds: float, limit_bytes: int) -> None:
    """End the process at a limit, from a thread: the computation may not return for minutes."""
    end, process, parent = time.monotonic() + seconds, psutil.Process(), os.getppid()
    while True:
        if os.getppid() != parent:  # nobody is left to read the reply
            os._exit(EXIT_OVER_LIMIT)
        if time.monotonic() > end:
            _give_up(f"it took more than {seconds:g} s")
        if limit_bytes and process.memory_info().rss > limit_bytes:
            _give_up(f"it needed more than {limit_bytes / 2**30:.3g} GiB of memory")
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _give_up(reason: str) -> None:
    print(reason, file=sys.stderr, flush=True)
    os._exit(EXIT_OVER_LIMIT)


if __name__ == "__main__":
    main()
