"""Where a variant's samples are taken: in a process of its own, or in this one."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TextIO

import torch

from training_framework.config import TrainConfig
from training_framework.config.loading import load_config
from training_framework.errors import UserError
from training_framework.measure.compare.result import Measurement, VariantFacts
from training_framework.measure.compare.timing import StepSampler
from training_framework.measure.compare.training_runs import RunSampler

__all__ = ["InlineWorker", "ProcessWorker", "Sampler", "VariantFailure", "Worker", "serve"]

SECONDS_TO_END = 3


class VariantFailure(Exception):
    """A variant cannot be measured; the message says why in one line."""


class Sampler(Protocol):
    """Takes one variant's samples: `StepSampler` or `RunSampler`."""

    facts: VariantFacts

    def sample(self, round_number: int) -> Measurement:
        """Take the sample of a round."""

    def close(self) -> None:
        """Release everything."""


class Worker(Protocol):
    """Runs one variant, in this process or another; only one worker computes at a time."""

    facts: VariantFacts

    def sample(self, round_number: int) -> Measurement:
        """Take the sample of a round. Raises VariantFailure if that fails."""

    def close(self) -> None:
        """End the worker."""


def open_sampler(config: TrainConfig, order: Mapping[str, Any]) -> Sampler:
    """Build a variant.

    Args:
        config: What to build.
        order: `measure`, `steps`, `seconds`, `warmup_steps` and `seeds` of the experiment; `peak`:
            the device's peak FLOP/s and its source, if already known.
    """
    if order["measure"] == "steps":
        return StepSampler(
            config,
            steps=order["steps"],
            seconds=order["seconds"],
            warmup_steps=order["warmup_steps"],
            peak=order.get("peak"),
        )
    return RunSampler(config, seeds=tuple(order["seeds"]), warmup_steps=order["warmup_steps"])


def failure_reason(error: Exception) -> str:
    """A variant's error in one line."""
    if isinstance(error, UserError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "alloc" in str(error).lower():
        return "out of memory" + (f": {lines[0]}" if lines else "")
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


class InlineWorker:
    """A variant in this process.

    Raises:
        VariantFailure: It cannot be built.
    """

    def __init__(self, config: TrainConfig, order: Mapping[str, Any]) -> None:
        try:
            self.sampler = open_sampler(config, order)
        except Exception as error:
            raise VariantFailure(failure_reason(error)) from error
        self.facts = self.sampler.facts

    def sample(self, round_number: int) -> Measurement:
        """Take the sample of a round."""
        try:
            return self.sampler.sample(round_number)
        except Exception as error:
            raise VariantFailure(failure_reason(error)) from error

    def close(self) -> None:
        """Close the loaders."""
        self.sampler.close()


class ProcessWorker:
    """A variant in a process of its own, which waits on its standard input between its turns.

    Requests and replies are lines of JSON. The process always ends with this one, because its input
    then ends. It has a session of its own, so that Ctrl-C reaches only this process.

    Args:
        config: What to measure.
        order: As for `open_sampler`.
        environment: Environment variables that differ from this process's.
        program: Arguments of the Python interpreter.

    Raises:
        VariantFailure: It cannot be built.
    """

    def __init__(
        self,
        config: TrainConfig,
        order: Mapping[str, Any],
        *,
        environment: Mapping[str, str],
        program: Sequence[str] = ("-m", "training_framework.measure.compare.worker"),
    ) -> None:
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            settings = config.model_dump(mode="json")
            self.facts = VariantFacts(**self._ask({"config": settings, "order": dict(order)}))
        except BaseException:
            self.close()
            raise

    def sample(self, round_number: int) -> Measurement:
        """Take the sample of a round."""
        return Measurement(**self._ask({"round": round_number}))

    def close(self) -> None:
        """End the process: close its input, and kill it if it does not end by itself."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise VariantFailure(self._end_reason())
        reply: dict[str, Any] = json.loads(line)
        if "failure" in reply:
            raise VariantFailure(reply["failure"])
        return reply

    def _end_reason(self) -> str:
        code = self._process.wait(SECONDS_TO_END)
        if code == -9:
            return "its process was killed (signal 9): the system does this when memory runs out"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return f"its process ended with {code}: {lines[-1] if lines else 'no message'}"


def serve(requests: TextIO, replies: TextIO) -> None:
    """Serve in the process: build what the first request says, then take samples until the end."""

    def reply(content: Mapping[str, Any]) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    first = json.loads(requests.readline() or "null")
    if first is None:
        return
    try:
        worker = InlineWorker(load_config(overrides=first["config"]), first["order"])
    except VariantFailure as failure:
        reply({"failure": str(failure)})
        return
    reply(worker.facts.model_dump())
    try:
        for line in requests:
            try:
                reply(worker.sample(json.loads(line)["round"]).model_dump())
            except VariantFailure as failure:
                reply({"failure": str(failure)})
    finally:
        worker.close()
