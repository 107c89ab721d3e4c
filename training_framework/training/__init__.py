"""One training run: its parts, the loop, evaluation, and how it stops."""
