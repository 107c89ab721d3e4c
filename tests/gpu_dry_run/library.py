"""The library that gives a PyTorch without CUDA a device cuda:0: built once, and loaded.

It imports no torch: the library must be loaded before.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.cpp")


class CannotBuildError(Exception):
    """There is no compiler, or the library is not for this PyTorch."""


def load() -> None:
    """Load the library into this process, which must not have imported torch.

    Raises:
        CannotBuildError: It cannot be built here.
    """
    assert "torch" not in sys.modules, "PyTorch looks for its CUDA hooks once, at its import"
    torch_folder = Path(str(importlib.util.find_spec("torch").origin)).parent
    built = _built(torch_folder)
    try:
        for name in ("libc10.so", "libtorch_cpu.so"):
            ctypes.CDLL(str(torch_folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(built)).register_fake_cuda()
    except OSError as error:
        raise CannotBuildError(str(error)) from None


def _built(torch_folder: Path) -> Path:
    """The library's file; one that is kept, where source and PyTorch are the same."""
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(SOURCE.read_bytes() + version.encode() + sys.version.encode())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "efficient-resnet" / "tests"
    library = folder / f"fake-cuda-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    compiler = shutil.which("g++")
    if compiler is None:
        raise CannotBuildError("there is no g++")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / library.name
        include = torch_folder / "include"
        command = [
            compiler, "-std=c++20", "-O0", "-shared", "-fPIC", str(SOURCE), "-o", str(made),
            f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}",
            f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CannotBuildError(f"g++ fails for PyTorch {version}: {done.stderr[:2000]}")
        made.replace(library)  # at once, whoever else builds it
    return library
