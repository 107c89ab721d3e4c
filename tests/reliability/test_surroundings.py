"""Trainings in odd but ordinary surroundings: containers, shared folders, closed or full outputs.

Each case is a fork of one process, prepared by a function in the child, that trains a few steps as
the command does. It must train, or end with one line that says the cure.
"""

import contextlib
import ctypes
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from experiment import run_experiment
from lives import end_fault, fork_life, warm_up

TRAIN = [
    "train", "--data=synthetic", "--model=resnet10", "--img-size=8", "--num-classes=3",
    "--epochs=1", "--synthetic-train-images=24", "--synthetic-val-images=6", "--batch-size=8",
    "--precision=32",
    # Who has no cache would compile them anew in each case.
    "--fused-norms=false", "--winograd-convolutions=false",
]  # fmt: skip
# Images of synthetic data are computed where they are used: no worker would start for them.
WORKERS = (
    "--num-workers=2", "--resident-data=false", "--data=digits", "--num-classes=10",
    "--limit-train-images=24",
)  # fmt: skip
ODD_FOLDER = os.fsdecode(b"--output-dir=out-\xff")
STRANGER = 12345  # a user id without a passwd entry


def nothing() -> None:
    """As it is."""


def close(*descriptors: int) -> Callable[[], None]:
    def prepare() -> None:
        for descriptor in descriptors:
            os.close(descriptor)
            setattr(sys, ("stdin", "stdout", "stderr")[descriptor], None)  # as Python starts then

    return prepare


def write_to(path: str, *descriptors: int) -> Callable[[], None]:
    def prepare() -> None:
        target = os.open(path, os.O_WRONLY)
        for descriptor in descriptors:
            os.dup2(target, descriptor)

    return prepare


def write_to_nobody(*descriptors: int) -> Callable[[], None]:
    def prepare() -> None:
        reading, writing = os.pipe()
        os.close(reading)
        for descriptor in descriptors:
            os.dup2(writing, descriptor)

    return prepare


def limit(name: str, amount: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(getattr(resource, name), (amount, amount))


def environment(**variables: str | None) -> Callable[[], None]:
    def prepare() -> None:
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        time.tzset()

    return prepare


def become_a_stranger() -> None:
    """Another user, without a home, a name, or a right to write anywhere but here."""
    Path().chmod(0o777)
    environment(HOME=None, USER=None, LOGNAME=None, USERNAME=None, XDG_CACHE_HOME=None)()
    os.setgroups([])
    os.setgid(STRANGER)
    os.setuid(STRANGER)


def after(*steps: Callable[[], None]) -> Callable[[], None]:
    def prepare() -> None:
        for step in steps:
            step()

    return prepare


def versions_of_another_user(mode: int, *, saved: bool = False) -> Callable[[], None]:
    """`version_0` of root below a folder that everybody may write to."""

    def prepare() -> None:
        version = Path("logs/resnet10-synthetic/version_0")
        (version / "checkpoints").mkdir(parents=True)
        if saved:
            (version / "checkpoints" / "last.ckpt").write_bytes(b"another's")
            (version / ".lock").touch()
        version.chmod(mode)
        Path("logs").chmod(0o777)
        version.parent.chmod(0o777)

    return prepare


def leave_the_working_directory() -> None:
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    Path(folder).rmdir()


def mount(place: str, options: str) -> Callable[[], None]:
    """Another file system at a place, for this process alone."""

    def prepare() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        new_namespace, private = 0x00020000, (1 << 18) | (1 << 14)
        if libc.unshare(new_namespace) or libc.mount(None, b"/", None, private, None):
            raise NoMountError
        read_only = 1 if options == "ro" else 0
        data = None if read_only else options.encode()
        if libc.mount(b"tmpfs", place.encode(), b"tmpfs", read_only, data):
            raise NoMountError

    return prepare


class NoMountError(Exception):
    """This process may not mount anything."""


def little_memory() -> None:
    """What the process has, and enough for all but the activations of large images.

    With less, a stack that may not grow, or a library, can end the process without a word.
    """
    status = Path("/proc/self/status").read_text()
    taken = int(status.partition("VmSize:")[2].split()[0]) * 1024
    limit("RLIMIT_AS", taken + 2**26)()


def clock_before_1980() -> None:
    time.time = lambda: 86400.0  # type: ignore[assignment]


def stop_and_resume() -> None:
    """A run that is stopped goes on below a folder whose name is no UTF-8."""
    from training_framework.cli.main import main

    assert main([*TRAIN, *ONE_THREAD, ODD_FOLDER, "--stop-after-steps=1"]) == 0


class Case(NamedTuple):
    prepare: Callable[[], None]
    flags: tuple[str, ...] = ()
    says: str = ""  # in its one line of error; empty: it trains
    status: int = 0


# A child that trains with more than one thread would hang, as forks of PyTorch do.
ONE_THREAD = ("--threads=1",)
CASES = {
    "as it is": Case(nothing),
    "closed input": Case(close(0)),
    "closed output": Case(close(1)),
    "closed error output": Case(close(2)),
    "closed error output, wrong flag": Case(close(2), ("--epochs=x",), status=2),
    "all closed": Case(close(0, 1, 2), WORKERS),
    "output that nobody reads": Case(write_to_nobody(1), status=1),
    "error output that nobody reads": Case(write_to_nobody(2)),
    "error output that nobody reads, wrong flag": Case(
        write_to_nobody(2), ("--epochs=x",), status=2
    ),
    "full output": Case(write_to("/dev/full", 1), says="cannot be written to"),
    "full error output": Case(write_to("/dev/full", 2)),
    "all full, wrong flag": Case(write_to("/dev/full", 1, 2), ("--epochs=x",), status=2),
    "output folder of invalid bytes": Case(stop_and_resume, (ODD_FOLDER,)),
    "output folder of many letters": Case(nothing, ("--output-dir=ausgänge-出力",)),
    "output folder is a file": Case(lambda: Path("logs").touch(), says="logs"),
    "output folder is a dangling link": Case(
        lambda: Path("logs").symlink_to("nowhere"), says="logs"
    ),
    "output folder is a circle of links": Case(
        lambda: Path("logs").symlink_to("logs"), says="logs"
    ),
    "a stranger": Case(become_a_stranger),
    "a stranger with workers": Case(become_a_stranger, WORKERS),
    "a stranger with a home that is another's": Case(
        after(become_a_stranger, environment(HOME="/root"))
    ),
    "a stranger beside a private run": Case(
        after(versions_of_another_user(0o700, saved=True), become_a_stranger)
    ),
    "a stranger beside a run that all may read": Case(
        after(versions_of_another_user(0o755, saved=True), become_a_stranger)
    ),
    "a stranger who may not write": Case(
        after(become_a_stranger, lambda: os.chdir("/usr")), says="cannot be written to"
    ),
    "no home": Case(environment(HOME=None)),
    "no environment": Case(os.environ.clear),
    "few open files": Case(limit("RLIMIT_NOFILE", 40)),
    "few open files, workers": Case(
        limit("RLIMIT_NOFILE", 40), WORKERS, says="open files, and only 40 are allowed; allow more"
    ),
    "few open files, workers, but more are allowed": Case(
        lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 4096)), WORKERS
    ),
    "hardly any open files": Case(limit("RLIMIT_NOFILE", 6), says="open files"),
    "little memory": Case(little_memory, ("--img-size=320",), says="memory is full"),
    "small files": Case(limit("RLIMIT_FSIZE", 2**16 + 1000), says="File too large"),
    "no files": Case(limit("RLIMIT_FSIZE", 0), status=2),  # not even one for what it says
    "one core": Case(lambda: os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])),
    "an odd time zone": Case(environment(TZ="Nowhere/Mars")),
    "a clock before 1980": Case(clock_before_1980),
    "no working directory": Case(leave_the_working_directory, says="working directory"),
    "no rights for anybody": Case(lambda: os.umask(0o777) and None),
    "a stranger whose files nobody may read": Case(
        after(become_a_stranger, lambda: os.umask(0o777) and None), says="umask"
    ),
    "rights for everybody": Case(lambda: os.umask(0) and None),
    "temporary folder that is full": Case(environment(TMPDIR="/dev/full")),
    "a tiny shared memory": Case(
        mount("/dev/shm", "size=8k"), WORKERS, says="--num-workers 0"
    ),
    "a shared memory for no batch": Case(
        mount("/dev/shm", "size=128k"), WORKERS, says="--num-workers 0"
    ),
    "no shared memory": Case(mount("/dev/shm", "ro"), WORKERS, says="--num-workers 0"),
    "a home that is read-only": Case(mount(str(Path.home()), "ro")),
    "a temporary folder that is read-only": Case(mount("/tmp", "ro"), ("--output-dir=/var/tmp/x",)),
    "no /proc": Case(mount("/proc", "size=8k"), says="/proc is not mounted"),
}  # fmt: skip


def surroundings(names: list[str]) -> dict[str, Any]:
    """How each case ended: its status and what it said."""
    from training_framework.cli.main import main

    warm_up()
    ends = {}
    for name in names:
        case = CASES[name]
        with tempfile.TemporaryDirectory(prefix="surroundings-") as temporary:
            folder = Path(temporary)
            (folder / "work").mkdir()
            folder.chmod(0o755)

            def work(folder: Path = folder, case: Case = case) -> int:
                os.chdir(folder / "work")
                tempfile.tempdir = None
                with contextlib.suppress(NoMountError):
                    case.prepare()
                    return main([*TRAIN, *ONE_THREAD, *case.flags])
                return 77  # it cannot be tried here

            life = fork_life(work, folder / "said")
            status = life.end()
            ends[name] = (status, life.said())
    return ends


@pytest.fixture(scope="module")
def ends(request: pytest.FixtureRequest) -> dict[str, tuple[int, str]]:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else and mount what is full")
    asked = {item.callspec.params["name"] for item in request.session.items
             if item.path == Path(__file__) and hasattr(item, "callspec")}  # fmt: skip
    return run_experiment(surroundings, names=sorted(asked))


@pytest.mark.parametrize("name", CASES)
def test_a_training_in_odd_surroundings_trains_or_says_what_to_do(name, ends):
    case, (status, said) = CASES[name], ends[name]
    if status == 77:
        pytest.skip("nothing can be mounted here")
    assert "fault of the program" not in said
    assert "Traceback" not in said
    assert status == (2 if case.says else case.status), said
    if case.says:
        assert not end_fault(status, said)
        assert case.says in said
