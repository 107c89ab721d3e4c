"""Compile a C++ source of this package for this processor, keep the result, and load it."""

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from training_framework.kernels.library_cache import (
    LibraryCache,
    cache_folder,
    load_by_descriptor,
)

__all__ = ["NativeKernelsError", "find_compiler", "load_library", "missing_compiler"]

# No -ffast-math: NaN and infinity must go through, for the run to notice them.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC")
COMPILERS = ("g++", "c++")
LONGEST_COMPILATION_SECONDS = 300


class NativeKernelsError(RuntimeError):
    """Native kernels cannot be compiled or loaded here; the message is one line that says why."""


def find_compiler() -> str | None:
    """The C++ compiler: `CXX` of the environment, else the first that is installed.

    What `CXX` names counts alone, so that one that is not installed is as good as none.

    Returns:
        The path of its program; None without one.
    """
    command = _compiler_command()
    return command[0] if command else None


def missing_compiler() -> str:
    """What to say where `find_compiler` finds none."""
    named = f"CXX is {os.environ['CXX']!r}" if os.environ.get("CXX") else "g++ would do"
    return f"no C++ compiler is installed ({named})"


def _compiler_command() -> list[str] | None:
    """The compiler with the flags that `CXX` may have after its name, as in `CXX="g++ -O2"`."""
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError:  # an open quotation mark
        return None
    for name, *flags in [named] if named else [[name] for name in COMPILERS]:
        if path := shutil.which(name):
            return [path, *flags]
    return None


@functools.cache
def load_library(source: Path) -> ctypes.CDLL:
    """Compile a source, unless that was done before, and load it.

    What was compiled is found again by a digest of the source, the flags, the compiler and what
    that makes of this processor. Where it cannot be kept, or what is kept cannot be trusted, it is
    compiled for this process alone, with a warning that says why.

    Args:
        source: A C++ file with a C interface. It may use OpenMP: it then shares the threads of
            PyTorch, which must be imported already.

    Raises:
        NativeKernelsError: There is no compiler, or it fails, or what it makes does not load.
    """
    command = _compiler_command()
    if command is None:
        raise NativeKernelsError(missing_compiler())
    openmp = _loaded_openmp()
    name = f"{source.stem}-{_digest(source, command, openmp)}"
    build = functools.partial(_compile, source, command, openmp)
    try:
        with contextlib.closing(_open_cache()) as cache:
            return _kept_or_built(cache, name, build)
    except OSError as error:
        _warn_once(str(error))
    return _load_privately(build)


def _open_cache() -> LibraryCache:
    folder = cache_folder()
    if folder is None:
        raise OSError("this user has no home folder")
    return LibraryCache(folder)


def _kept_or_built(cache: LibraryCache, name: str, build: Callable[[], bytes]) -> ctypes.CDLL:
    if library := cache.load(name):
        return library
    with cache.one_builder():
        if library := cache.load(name):  # another process was faster
            return library
        cache.keep(name, build())
        library = cache.load(name)
    if library is None:
        raise OSError("a library that was just written does not load")
    return library


def _load_privately(build: Callable[[], bytes]) -> ctypes.CDLL:
    """Build for this process alone: the file is gone when this returns."""
    try:
        with tempfile.TemporaryDirectory(prefix="efficient-resnet-") as folder:
            path = Path(folder) / "kernels.so"
            path.write_bytes(build())
            return load_by_descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC), path)
    except OSError as error:
        raise NativeKernelsError(f"compiled kernels do not load: {error}") from None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"native kernels are compiled anew for each process, since {reason}; "
        "to keep them, set XDG_CACHE_HOME to a folder that only you can write to",
        stacklevel=3,
    )


def _loaded_openmp() -> str | None:
    """The OpenMP runtime that PyTorch has loaded in this process; None without one.

    A second runtime would bring a second set of threads, which spin while they wait and take the
    cores from the first. Other libraries may have brought one of their own.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    paths = dict.fromkeys(Path(line.split(maxsplit=5)[-1]) for line in maps.splitlines())
    runtimes = [path for path in paths if path.name.startswith(("libgomp", "libiomp5", "libomp"))]
    package = Path(torch.__file__).parent
    own = [path for path in runtimes if package in path.parents or path.parent.name == "torch.libs"]
    return next((str(path) for path in [*own, *runtimes] if path.is_file()), None)


def _digest(source: Path, command: list[str], openmp: str | None) -> str:
    said = _what_it_makes_of_this_processor(tuple(command))
    parts = [source.read_text(encoding="utf-8"), *FLAGS, *command, *said, str(openmp)]
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:16]


@functools.cache
def _what_it_makes_of_this_processor(command: tuple[str, ...]) -> tuple[str, ...]:
    """Its version and its macros; asked once a process, since a start waits for the answers."""
    macros = ["-march=native", "-dM", "-E", "-x", "c", os.devnull]
    return tuple(_run([*command, *flags]) for flags in (["--version"], macros))


def _compile(source: Path, command: list[str], openmp: str | None) -> bytes:
    try:
        with tempfile.TemporaryDirectory(prefix="efficient-resnet-") as folder:
            compiled, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
            use_openmp = ["-fopenmp"] if openmp else []
            _run([*command, *FLAGS, *use_openmp, "-c", str(source), "-o", str(compiled)])
            # By its path, where -fopenmp would link another runtime than PyTorch's.
            runtime = [openmp] if openmp else []
            _run([*command, "-shared", str(compiled), *runtime, "-o", str(linked)])
            return linked.read_bytes()
    except OSError as error:
        raise NativeKernelsError(f"no place to compile in: {error}") from None


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, text=True, errors="replace",
            check=False, timeout=LONGEST_COMPILATION_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeKernelsError(f"{command[0]} failed: {error}") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        fault = next((line for line in said if "error" in line), said[0])
        raise NativeKernelsError(f"{command[0]} failed: {fault}")
    return done.stdout
