"""A machine that has Python, PyTorch and NumPy, and nothing else: for test_gpu_suite.py."""

import importlib.metadata
import importlib.util
import os
import subprocess
import venv
import zipfile
from pathlib import Path

__all__ = ["make_bare_python", "make_wheel", "run_bare"]

# PyTorch, NumPy, and what they need themselves.
PRESENT = (
    "_distutils_hack", "filelock", "fsspec", "functorch", "jinja2", "markupsafe", "mpmath",
    "networkx", "numpy", "numpy.libs", "setuptools", "sympy", "torch", "torch.libs", "torchgen",
    "typing_extensions.py",
)  # fmt: skip
NO_NETWORK = """
import socket

_connect = socket.socket.connect


def _refuse(self, address):
    if self.family != socket.AF_UNIX:
        raise OSError("there is no network here")
    return _connect(self, address)


socket.socket.connect = _refuse
"""


def make_bare_python(folder: Path) -> Path:
    """An interpreter that can import nothing but PyTorch, NumPy and what they need.

    It has no network: sockets refuse to connect.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    here = Path(spec.origin).parents[1]
    found = [here / name for name in PRESENT]
    found += [*here.glob("torch-*.dist-info"), *here.glob("numpy-*.dist-info")]
    for path in found:
        if path.exists():
            (site / path.name).symlink_to(path)
    (site / "sitecustomize.py").write_text(NO_NETWORK)
    return folder / "bin" / "python"


def make_wheel(name: str, folder: Path) -> None:
    """A wheel of a package as it is installed here."""
    package = importlib.metadata.distribution(name)
    stem = f"{package.name.replace('-', '_')}-{package.version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for file in package.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                wheel.write(str(package.locate_file(file)), str(file))


def run_bare(python: Path, *arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run the interpreter with no environment, in which not even git can be found."""
    nothing = cwd / "empty"
    nothing.mkdir(exist_ok=True)
    environment = {"PATH": str(nothing), "HOME": str(nothing), "OMP_NUM_THREADS": "1"}
    assert not os.listdir(nothing)  # noqa: PTH208
    return subprocess.run(
        [str(python), *arguments], cwd=cwd, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
