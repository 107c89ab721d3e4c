"""Runs one training on a fake GPU, in this process, and says what was observed.

A case is an object with `settings` of the configuration, `gpu` (arguments of `fake_cuda`),
`processes` (how many there seem to be, of which this is rank 0), `resumed_with` (settings with
which the run goes on after its third step) and `plants`: faults to plant, as [function, text, text
in its place].
"""

import contextlib
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fake_cuda import fake_cuda
from fake_processes import fake_processes
from observer import Observed

from training_framework.checkpoint import CheckpointKeeper
from training_framework.config import TrainConfig
from training_framework.machine import hardware
from training_framework.runs.start import Start
from training_framework.training import parts as parts_module
from training_framework.training import run as run_module
from training_framework.training.finiteness import FinitenessGuard
from training_framework.training.run import TrainingRun
from training_framework.training.trainer import Trainer

SETTINGS = {
    "data": "digits", "model": "resnet10", "epochs": 1, "batch_size": 512, "accelerator": "gpu",
    "tensorboard": False, "resume": "never", "log_every_n_steps": 50,
}  # fmt: skip


def fault_of_fake_cuda() -> str:
    """Why this PyTorch does not take what was loaded for CUDA; empty where it does."""
    if torch.version.cuda or torch.version.hip:
        return "this PyTorch is built with a CUDA of its own"
    try:
        with fake_cuda(Observed()) as mode, mode:
            weight = torch.ones(2, 2, device="cuda", requires_grad=True)
            (weight @ weight).sum().backward()
            place = str(weight.grad.device)
    except Exception as error:  # private interfaces of torch: whatever they do
        return f"fake tensors on cuda:0 fail: {error}"
    return "" if place == "cuda:0" else f"a gradient is on {place}"


def report_of(case: dict[str, Any]) -> dict[str, Any]:
    """Run a case in this process and say what was observed."""
    observed, error, steps, facts = Observed(), "", 0, dict[str, Any]()
    processes = case.get("processes", 1)
    gpu = {key: tuple(v) if key == "capability" else v for key, v in case.get("gpu", {}).items()}
    for function, old, new in case.get("plants", []):
        plant(function, old, new)
    try:
        with contextlib.ExitStack() as stack:
            mode = stack.enter_context(fake_cuda(observed, count=processes, **gpu))
            if processes > 1:
                stack.enter_context(fake_processes(processes))
            stack.enter_context(_noting_when(observed))
            stack.enter_context(_as_on_a_gpu_machine())
            saves = stack.enter_context(_saves_in_memory())
            settings = {**SETTINGS, **case.get("settings", {})}
            if "resumed_with" in case:
                first = TrainingRun(TrainConfig(**settings, stop_after_steps=3))
                with mode:
                    first.execute()
                start = Start(state=saves[-1], checkpoint=Path("last.ckpt"))
                settings |= {"allow_config_change": True, **case["resumed_with"]}
                stack.enter_context(mock.patch.object(run_module, "choose_start", lambda *_: start))
            training = TrainingRun(TrainConfig(**settings))
            plan = training.plan
            facts = {
                "plan": {"device": plan.device, **plan.switch_values()},
                "epochs": plan.epochs,
                "world_size": plan.world_size,
                "resumed_at": saves[-1]["progress"]["step"] if saves else 0,
                "steps_per_epoch": plan.steps_per_epoch,
            }
            with mode:
                steps = training.execute().steps
    except Exception:
        error = traceback.format_exc()
    observations = {**vars(observed), "launched": dict(observed.launched)}
    return {**observations, **facts, "steps": steps, "error": error}


def _noting_when(observed: Observed) -> Any:
    """Note what the run is doing, while it does it."""
    make_step, evaluate, save = Trainer._make_step, parts_module.evaluate, CheckpointKeeper.save

    def during(what: str, call: Any, *arguments: Any, **options: Any) -> Any:
        before, observed.when = observed.when, what
        try:
            return call(*arguments, **options)
        finally:
            observed.when = "between steps" if before == "start" else before

    def step(self: Trainer, *arguments: Any, **options: Any) -> Any:
        name = f"step {self.progress.step + 1}"
        return during(name, make_step, self, *arguments, **options)

    stack = contextlib.ExitStack()
    for owner, name, value in (
        (Trainer, "_make_step", step),
        (parts_module, "evaluate", lambda *a, **k: during("evaluation", evaluate, *a, **k)),
        (CheckpointKeeper, "save", lambda *a, **k: during("save", save, *a, **k)),
    ):
        stack.enter_context(mock.patch.object(owner, name, value))
    return stack


@contextlib.contextmanager
def _saves_in_memory() -> Iterator[list[dict[str, Any]]]:
    """The state of each save."""
    states: list[dict[str, Any]] = []
    save = CheckpointKeeper.save

    def keep(self: CheckpointKeeper, state: dict[str, Any], **how: Any) -> None:
        states.append(state)
        save(self, state, **how)

    with mock.patch.object(CheckpointKeeper, "save", keep):
        yield states


def _as_on_a_gpu_machine() -> Any:
    """Triton is there, and tensors without content are not written, nor a reason to stop."""
    stack, settle = contextlib.ExitStack(), FinitenessGuard.settle
    stack.enter_context(
        mock.patch.object(FinitenessGuard, "settle", lambda self, _, **how: settle(self, 0, **how))
    )
    stack.enter_context(mock.patch.object(hardware, "find_triton_fault", lambda: ""))
    stack.enter_context(mock.patch.object(CheckpointKeeper, "_write", lambda *_: None))
    stack.enter_context(mock.patch.object(run_module, "save_weights", lambda *_: None))
    return stack


def plant(function: str, old: str, new: str) -> None:
    """Exchange a piece of a function's text, wherever the function has been imported to.

    Args:
        function: `module:qualified.name`.
        old: It must be found in the module once.
        new: Takes its place.
    """
    module_name, _, qualified_name = function.partition(":")
    module = sys.modules[module_name]
    text = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {module_name}"
    found = compile(text.replace(old, new), str(module.__file__), "exec")
    target: Any = module
    for part in qualified_name.split("."):
        target = getattr(target, part)
    target = getattr(target, "__func__", target)  # of a class method
    while hasattr(target, "__wrapped__"):  # by a decorator
        target = target.__wrapped__
    target.__code__ = _code_named(found, qualified_name)


def _code_named(code: types.CodeType, qualified_name: str) -> types.CodeType:
    waiting = [code]
    while waiting:
        inner = waiting.pop()
        if inner.co_qualname == qualified_name:
            return inner
        waiting += [value for value in inner.co_consts if isinstance(value, types.CodeType)]
    raise AssertionError(f"{qualified_name} is not found")
