"""Each guard is taken away, and the test that is named for it must then fail."""

import fcntl
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from training_framework.checkpoint import keeper, writing
from training_framework.data import sampling
from training_framework.data.loading import ResidentLoader
from training_framework.errors import UserError
from training_framework.training import resuming as resumption

TESTS = Path(__file__).parents[1]


def without_flush_of_the_file(monkeypatch):
    class WithoutFsync:
        def __getattr__(self, name):
            return (lambda descriptor: None) if name == "fsync" else getattr(os, name)

    monkeypatch.setattr(writing, "os", WithoutFsync())


def without_flush_of_the_folder(monkeypatch):
    monkeypatch.setattr(keeper, "flush_directory", lambda directory: None)


def without_replace(monkeypatch):
    def write_in_place(path, state):
        with path.open("wb", buffering=0) as file:
            checksums = writing.write_tensors(file, state)
            writing.write_header(file, state, checksums)
        return path

    monkeypatch.setattr(keeper, "write_beside", write_in_place)


def without_random_states(monkeypatch):
    monkeypatch.setattr(resumption, "restore_random_states", lambda states, device: None)


def without_sampler_offset(monkeypatch):
    epoch_from = ResidentLoader.epoch
    monkeypatch.setattr(
        ResidentLoader, "epoch", lambda self, epoch, start_batch=0: epoch_from(self, epoch)
    )


def without_scaler(monkeypatch):
    monkeypatch.setattr(torch.amp.GradScaler, "load_state_dict", lambda self, state: None)


def without_lock(monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)


def with_padding(monkeypatch):
    def padded_share(samples, rank, world_size):
        size = -(-len(samples) // world_size)
        return samples[[index % len(samples) for index in range(rank * size, (rank + 1) * size)]]

    monkeypatch.setattr(sampling, "_share", padded_share)


@dataclass(frozen=True)
class Guard:
    """A guard's removal, and the test that must notice it, with the arguments that it needs."""

    remove: Callable[[pytest.MonkeyPatch], None]
    test: str
    arguments: dict[str, Any] = field(default_factory=dict)


FLUSHES = (
    "reliability/test_guards.py::"
    "test_a_checkpoint_is_on_the_disk_before_it_takes_its_name_and_then_the_name_is"
)
GUARDS = [
    Guard(without_flush_of_the_file, FLUSHES),
    Guard(without_flush_of_the_folder, FLUSHES),
    Guard(
        without_replace,
        "reliability/test_guards.py::test_a_save_that_breaks_off_leaves_the_checkpoint_before_it",
    ),
    Guard(
        without_random_states,
        "reliability/test_guards.py::test_a_network_that_draws_goes_on_with_the_draws_that_are_next",
    ),
    Guard(
        without_sampler_offset,
        "reliability/test_guards.py::test_a_resumed_epoch_takes_the_samples_that_are_left",
    ),
    Guard(without_scaler, "test_train.py::test_fp16_resumes_with_its_gradient_scale"),
    Guard(without_lock, "reliability/test_guards.py::test_a_directory_has_one_writer_at_a_time"),
    Guard(
        with_padding,
        "data/test_sampling.py::test_evaluation_counts_every_sample_once",
        {"count": 10, "world_size": 3},
    ),
]


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.remove.__name__)
def test_without_the_guard_its_test_fails(guard, in_tmp_path, monkeypatch):
    file, _, name = guard.test.partition("::")
    test = getattr(loaded(TESTS / file), name)
    fixtures = {"tmp_path": in_tmp_path, "in_tmp_path": in_tmp_path, "monkeypatch": monkeypatch}
    wanted = {key: value for key, value in fixtures.items() if key in arguments_of(test)}
    guard.remove(monkeypatch)
    with pytest.raises((AssertionError, UserError, pytest.fail.Exception)):
        test(**wanted, **guard.arguments)


def arguments_of(test: Callable[..., None]) -> tuple[str, ...]:
    code = test.__code__
    return code.co_varnames[: code.co_argcount]


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"guarded_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
