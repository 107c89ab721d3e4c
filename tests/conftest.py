"""What all tests share: few threads, and a clean working directory for those that write."""

import os

# Workers of pytest-xdist share the cores: more threads would spin, and slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
# A thread that waits for the others sleeps: spinning, it would take the core that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forks import Forks

from training_framework.config.config import Config
from training_framework.models import resnet

# Under nohup, which ignores it, every program that a test starts would ignore it too.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true",
        help="run the tests marked `long` at full length, and write their result files",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device; see benchmarks/gpu_suite.py")
    if config.getoption("--long"):
        os.environ["LONG_TESTS"] = "1"  # test modules read it when they are imported


# Fixtures that take many seconds; tests that share one stay in one worker (--dist loadgroup).
COSTLY_FIXTURES = ("_server", "ends", "trained_runs", "ranks")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        shared = set(COSTLY_FIXTURES).intersection(getattr(item, "fixturenames", ()))
        if shared:
            item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name} {shared.pop()}"))
    # The longest first, so that no worker is left with one when the others are done.
    items.sort(key=lambda item: not any(item.iter_markers("xdist_group")))
    items.sort(key=lambda item: not any(item.iter_markers("long")))
    if not config.getoption("--long"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.timeout(0), append=False)


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether to run at full length; for tests marked `long`."""
    return bool(request.config.getoption("--long"))


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that runs write nowhere else."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts Python programs as forks of one process that has imported torch."""
    started = Forks()
    yield started
    started.close()


@pytest.fixture(scope="module")
def narrow_networks() -> Iterator[None]:
    """ResNets of a sixteenth of their width, for tests that are not about the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "STAGE_CHANNELS", (4, 8, 16, 32))
        yield


@pytest.fixture(autouse=True)
def _same_state_for_every_test() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    Config.reset()
