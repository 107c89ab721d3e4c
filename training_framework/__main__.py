"""`python -m training_framework`, as torchrun starts it."""

import sys

from training_framework.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
