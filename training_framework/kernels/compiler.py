"""Compile a C++ source of this package for this processor, cache the result, and load it."""

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

# No -ffast-math: NaN and infinity must pass through, so that the run notices them.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC")
COMPILERS = ("g++", "c++")
MAX_COMPILATION_SECONDS = 300


class NativeKernelsError(RuntimeError):
    """Native kernels cannot be compiled or loaded here; the message is the reason, in one line."""


def find_compiler() -> str | None:
    """The C++ compiler: `CXX` of the environment, otherwise the first that is installed.

    If `CXX` is set, no other compiler is tried, even if that one is not installed.

    Returns:
        The path of the program; None if there is none.
    """
    command = _compiler_command()
    return command[0] if command else None


def missing_compiler() -> str:
    """What to say where `find_compiler` finds none."""
    named = f"CXX is {os.environ['CXX']!r}" if os.environ.get("CXX") else "g++ would suffice"
    return f"no C++ compiler is installed ({named})"


def _compiler_command() -> list[str] | None:
    """The compiler with the flags that may follow its name in `CXX`, as in `CXX="g++ -O2"`."""
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError:  # an unclosed quotation mark
        return None
    for name, *flags in [named] if named else [[name] for name in COMPILERS]:
        if path := shutil.which(name):
            return [path, *flags]
    return None


@functools.cache
def load_library(source: Path) -> ctypes.CDLL:
    """Compile a source, unless the library is cached, and load it.

    The name of a cached library contains a digest of the source, the flags, the compiler and the
    compiler's settings for this processor. If libraries cannot be cached or the cache cannot be
    trusted, the source is compiled for this process alone, with a warning that gives the reason.

    Args:
        source: A C++ file with a C interface. It may use OpenMP; then it shares the threads of
            PyTorch, which must already be imported.

    Raises:
        NativeKernelsError: There is no compiler, it fails, or the library does not load.
    """
    command = _compiler_command()
    if command is None:
        raise NativeKernelsError(missing_compiler())
    openmp = _loaded_openmp()
    name = f"{source.stem}-{_digest(source, command, openmp)}"
    build = functools.partial(_compile, source, command, openmp)
    try:
        with contextlib.closing(_open_cache()) as cache:
            return _cached_or_built(cache, name, build)
    except OSError as error:
        _warn_once(str(error))
    return _load_privately(build)


def _open_cache() -> LibraryCache:
    folder = cache_folder()
    if folder is None:
        raise OSError("this user has no home folder")
    return LibraryCache(folder)


def _cached_or_built(cache: LibraryCache, name: str, build: Callable[[], bytes]) -> ctypes.CDLL:
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
    """Build for this process alone; the file is removed before this returns."""
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
        f"every process compiles its native kernels anew, since {reason}; "
        "to cache them, set XDG_CACHE_HOME to a folder that only you can write to",
        stacklevel=3,
    )


def _loaded_openmp() -> str | None:
    """The OpenMP runtime that PyTorch has loaded in this process; None if there is none.

    A second runtime would start a second set of threads, which spin while they wait and take the
    cores from the first. Other libraries may have loaded runtimes of their own.
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
    outputs = _version_and_macros(tuple(command))
    parts = [source.read_text(encoding="utf-8"), *FLAGS, *command, *outputs, str(openmp)]
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:16]


@functools.cache
def _version_and_macros(command: tuple[str, ...]) -> tuple[str, ...]:
    """The compiler's version and its macros for this processor, queried once per process."""
    macros = ["-march=native", "-dM", "-E", "-x", "c", os.devnull]
    return tuple(_run([*command, *flags]) for flags in (["--version"], macros))


def _compile(source: Path, command: list[str], openmp: str | None) -> bytes:
    try:
        with tempfile.TemporaryDirectory(prefix="efficient-resnet-") as folder:
            compiled, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
            use_openmp = ["-fopenmp"] if openmp else []
            _run([*command, *FLAGS, *use_openmp, "-c", str(source), "-o", str(compiled)])
            # Link PyTorch's runtime by its path; -fopenmp would link another one.
            runtime = [openmp] if openmp else []
            _run([*command, "-shared", str(compiled), *runtime, "-o", str(linked)])
            return linked.read_bytes()
    except OSError as error:
        raise NativeKernelsError(f"no folder to compile in: {error}") from None


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, text=True, errors="replace",
            check=False, timeout=MAX_COMPILATION_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeKernelsError(f"{command[0]} failed: {error}") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        fault = next((line for line in lines if "error" in line), lines[0])
        raise NativeKernelsError(f"{command[0]} failed: {fault}")
    return done.stdout
