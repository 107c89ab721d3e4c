"""Compare a stopped and resumed run with an uninterrupted one, both deterministic.

    python benchmarks/resumed_run.py --accelerator gpu --batch-size 256

Flags are those of `efficient-resnet train`. Exits with 1 if the weights differ in any bit.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = (
    "--data", "synthetic", "--num-classes", "10", "--seed", "0", "--img-size", "32",
    "--synthetic-train-images", "8192", "--epochs", "2", "--deterministic",
    "--tensorboard", "false",
)  # fmt: skip


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        train(folder, "straight", [*FLAGS, *sys.argv[1:]])
        train(folder, "stopped", [*FLAGS, *sys.argv[1:], "--stop-after-steps", "3"])
        last = Path(folder, "stopped", "version_0", "checkpoints", "last.ckpt")
        train(folder, "stopped", ["--resume", str(last)])
        ours, theirs = (
            Path(folder, name, "version_0", "weights.safetensors").read_bytes()
            for name in ("straight", "stopped")
        )
    same = ours == theirs
    print(f"the resumed run ended with {'the same' if same else 'other'} weights")
    return int(not same)


def train(folder: str, name: str, flags: list[str]) -> None:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "training_framework", "train"]
    subprocess.run([*command, *flags, "--name", name, "--output-dir", folder], check=True)


if __name__ == "__main__":
    sys.exit(main())
