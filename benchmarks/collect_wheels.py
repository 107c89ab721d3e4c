"""Collect the packages that gpu_suite.py brings to a machine that has only PyTorch and NumPy.

    python benchmarks/collect_wheels.py                      # for Python 3.12 on x86-64 Linux
    python benchmarks/collect_wheels.py --python 3.11 --machine aarch64 --output DIR

The versions are those of the environment that this runs in. The wheels go to benchmarks/wheels/,
which git ignores: 30 MB, and 13 MB with --without-plots. gpu_suite.py reads them there.
"""

import argparse
import importlib.metadata
import subprocess
import sys
from pathlib import Path

__all__ = ["BROUGHT", "FOR_PLOTS", "NOT_NEEDED", "PRESENT", "requirements"]

WHEELS = Path(__file__).parent / "wheels"
# What PyTorch needs is brought too where newer versions may be needed than the machine has.
BROUGHT = (
    "annotated-types", "iniconfig", "Jinja2", "MarkupSafe", "nvidia-ml-py", "packaging", "pillow",
    "pluggy", "psutil", "pydantic", "pydantic-core", "pygments", "pytest", "pytest-timeout",
    "PyYAML", "safetensors", "simplejpeg", "tqdm", "typing-extensions", "typing-inspection",
)  # fmt: skip
# Without them, the page has tables but no curves.
FOR_PLOTS = (
    "contourpy", "cycler", "fonttools", "kiwisolver", "matplotlib", "pyparsing", "python-dateutil",
    "tzdata",
)  # fmt: skip
PRESENT = ("torch", "numpy")
# Dependencies of the package that no part of the suite uses, and what else needs them.
NOT_NEEDED = {
    "tensorboard": "events for TensorBoard, which the suite switches off",
    "scikit-learn": "the digits data set",
    "pooch": "downloads",
}
# pip matches each of them exactly.
GLIBC = ("2_5", "2_12", "2_17", "2_24", "2_26", "2_27", "2_28", "2_31", "2_34", "2_35")
OLD_NAMES = ("manylinux1", "manylinux2010", "manylinux2014")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="its Python (3.12)")
    parser.add_argument("--machine", default="x86_64", help="its processor (x86_64)")
    parser.add_argument("--without-plots", action="store_true", help="leave matplotlib out")
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="NAME==VERSION", help="further packages"
    )
    parser.add_argument("--output", type=Path, default=WHEELS, help="folder (benchmarks/wheels)")
    options = parser.parse_args()
    names = BROUGHT if options.without_plots else (*BROUGHT, *FOR_PLOTS)
    wanted = [*requirements(names), *options.also]
    options.output.mkdir(parents=True, exist_ok=True)
    for old in options.output.glob("*.whl"):  # two versions of a package would mix
        old.unlink()
    done = subprocess.run(
        [*download_command(options.python, options.machine), "-d", str(options.output), *wanted],
        check=False,
    )
    if done.returncode:
        print(f"pip could not collect them all in {options.output}; see its message above")
        return 1
    wheels = sorted(options.output.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels, {size / 2**20:.1f} MB, in {options.output}")
    return 0


def requirements(names: tuple[str, ...]) -> list[str]:
    """The packages at the versions that are installed here, as `NAME==VERSION`."""
    return [f"{name}=={importlib.metadata.version(name)}" for name in names]


def download_command(python: str, machine: str) -> list[str]:
    """pip's command that downloads wheels for another machine, without what they depend on."""
    platforms = [*(f"manylinux_{version}" for version in GLIBC), *OLD_NAMES]
    abi = f"cp{python.replace('.', '')}"
    flags = [f"--platform={platform}_{machine}" for platform in platforms]
    flags += [f"--abi={name}" for name in (abi, "abi3", "none")]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    return [
        *pip, "--no-deps", "--only-binary=:all:", "--implementation=cp",
        f"--python-version={python}", *flags,
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
