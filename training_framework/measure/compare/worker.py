"""The process of one variant: `python -m training_framework.measure.compare.worker`."""

import os
import sys

from training_framework.measure.compare.workers import serve


def main() -> None:
    """Answer requests from standard input until it ends."""
    # What libraries print must not mix with the replies.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
