"""Compile a C++ source of this package for this processor, keep the result, and load it."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

__all__ = ["NativeKernelsError", "cache_folder", "find_compiler", "load_library"]

# No -ffast-math: NaN and infinity must go through, for the run to notice them.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC")
COMPILERS = ("g++", "c++")
LONGEST_COMPILATION_SECONDS = 300


class NativeKernelsError(RuntimeError):
    """Native kernels cannot be compiled or loaded here; the message is one line that says why."""


def find_compiler() -> str | None:
    """The C++ compiler: `CXX` of the environment, else the first that is installed."""
    candidates = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return next((path for name in candidates if (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where compiled kernels are kept between runs; `XDG_CACHE_HOME` moves it."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        home = Path(given) if given else Path.home() / ".cache"
    except RuntimeError:  # a container's user, with neither HOME nor a name
        home = Path(tempfile.gettempdir()) / f"cache-of-user-{os.getuid()}"
    return home / "efficient-resnet" / "native"


@functools.cache
def load_library(source: Path) -> ctypes.CDLL:
    """Compile a source, unless that was done before, and load it.

    What was compiled is found again by a digest of the source, the flags, the compiler and what
    that makes of this processor.

    Args:
        source: A C++ file with a C interface. It may use OpenMP: it then shares the threads of
            PyTorch, which must be imported already.

    Raises:
        NativeKernelsError: There is no compiler, or it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        raise NativeKernelsError("no C++ compiler is installed (g++, or the one that CXX names)")
    openmp = _loaded_openmp()
    library = cache_folder() / f"{source.stem}-{_digest(source, compiler, openmp)}.so"
    try:
        try:
            return ctypes.CDLL(str(library))
        except OSError:  # it is not there, or damaged
            _compile(source, compiler, openmp, library)
            return ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeKernelsError(f"{library}: {error}") from None


def _loaded_openmp() -> str | None:
    """The OpenMP runtime that PyTorch has loaded in this process; None without one.

    A second runtime would bring a second set of threads, which spin while they wait and take the
    cores from the first. Other libraries may have brought one of their own.
    """
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    paths = dict.fromkeys(Path(line.split(maxsplit=5)[-1]) for line in lines)
    runtimes = [path for path in paths if path.name.startswith(("libgomp", "libiomp5", "libomp"))]
    package = Path(torch.__file__).parent
    own = [path for path in runtimes if package in path.parents or path.parent.name == "torch.libs"]
    return next((str(path) for path in [*own, *runtimes] if path.is_file()), None)


def _digest(source: Path, compiler: str, openmp: str | None) -> str:
    said = _what_it_makes_of_this_processor(compiler)
    parts = [source.read_text(encoding="utf-8"), *FLAGS, compiler, *said, str(openmp)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _what_it_makes_of_this_processor(compiler: str) -> tuple[str, ...]:
    """Its version and its macros; asked once a process, since a start waits for the answers."""
    macros = ["-march=native", "-dM", "-E", "-x", "c", os.devnull]
    return tuple(_run([compiler, *flags]) for flags in (["--version"], macros))


def _compile(source: Path, compiler: str, openmp: str | None, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        use_openmp = ["-fopenmp"] if openmp else []
        _run([compiler, *FLAGS, *use_openmp, "-c", str(source), "-o", str(compiled)])
        # By its path, where -fopenmp would link another runtime than PyTorch's.
        runtime = [openmp] if openmp else []
        _run([compiler, "-shared", str(compiled), *runtime, "-o", str(linked)])
        linked.replace(library)  # at once, so that no other process loads a part of it


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False,
            timeout=LONGEST_COMPILATION_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeKernelsError(f"{command[0]} failed: {error}") from None
    if done.returncode != 0:
        first = next(iter(done.stderr.strip().splitlines()), f"status {done.returncode}")
        raise NativeKernelsError(f"{command[0]} failed: {first}")
    return done.stdout
