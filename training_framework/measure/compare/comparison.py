"""The engine: variants take turns, A B B A, and the result is saved after every round."""

import datetime
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError
from tqdm import tqdm

from training_framework.config import TrainConfig
from training_framework.errors import UserError
from training_framework.machine.hardware import detect_hardware
from training_framework.measure.compare.assessment import VariantRecord, assess
from training_framework.measure.compare.environment import (
    environment_of,
    missing_need,
    source_commit,
)
from training_framework.measure.compare.experiment import Experiment, Variant
from training_framework.measure.compare.quiet import QuietMachine
from training_framework.measure.compare.result import (
    Measurement,
    Result,
    VariantFacts,
    load_result,
    save_result,
)
from training_framework.measure.compare.workers import (
    InlineWorker,
    ProcessWorker,
    VariantFailure,
    Worker,
)
from training_framework.training.stopping import StopSignals

__all__ = ["Comparison", "OpenWorker"]

OpenWorker = Callable[[Variant, TrainConfig, Mapping[str, Any]], Worker]


class Comparison:
    """A comparison in progress, new or resumed.

    Args:
        experiment: What is compared, and how.
        path: The result file; written after every round.
        command: The command that repeats it, for the file.
        open_worker: Starts a variant; None: as the experiment's `isolation` says.
        stream: Where progress goes; None: standard error.

    Attributes:
        stopped_by: The signal that ended `run` early; empty if none did.
    """

    def __init__(
        self,
        experiment: Experiment,
        *,
        path: Path,
        command: str,
        open_worker: OpenWorker | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.experiment = experiment
        self.path = path
        self.stopped_by = ""
        self._open_worker = open_worker or _opener(experiment)
        self._stream = sys.stderr if stream is None else stream
        self._hardware = detect_hardware()
        self._variants = experiment.all_variants()
        self._records = {variant.name: VariantRecord() for variant in self._variants}
        self._workers: dict[str, Worker] = {}
        self._quiet: QuietMachine | None = None
        self._first_round = self._finished_rounds = self._starts = 0
        self._origin: dict[str, Any] = {
            "command": command,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": source_commit(),
            "environment": environment_of(self._hardware),
        }

    @classmethod
    def resume(cls, path: Path, *, rounds: int | None = None, **options: Any) -> "Comparison":
        """Resume the comparison of a result file.

        Args:
            path: The result file; its finished rounds are kept.
            rounds: Total number of rounds; None: as the experiment says.
            **options: `open_worker` and `stream`, as for a new one.

        Raises:
            UserError: The file is wrong, or was made with another machine, version or commit.
        """
        result = load_result(path)
        try:
            experiment = Experiment(**result.definition)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"{path}: definition: {first['loc']}: {first['msg']}", "start a new comparison"
            ) from None
        if rounds is not None:
            experiment = experiment.model_copy(update={"rounds": rounds})
        comparison = cls(experiment, path=path, command=result.command, **options)
        here = comparison._origin
        differing = [
            f"{key}: {then!r} then, {here['environment'].get(key)!r} now"
            for key, then in result.environment.items()
            if here["environment"].get(key) != then
        ]
        if here["commit"] != result.commit:
            differing.append(f"commit: {result.commit} then, {here['commit']} now")
        if differing:
            raise UserError(
                f"{path}: cannot resume: the environment changed: {'; '.join(differing)}",
                "start a new comparison",
            )
        for variant in result.variants:
            comparison._records[variant.name] = VariantRecord(
                facts=variant.facts,
                measurements=list(variant.measurements),
                unavailable=variant.unavailable,
            )
        comparison._finished_rounds = result.rounds
        comparison._starts = 1 + max(
            (m.process for variant in result.variants for m in variant.measurements), default=-1
        )
        comparison._origin["started"] = result.started
        return comparison

    def run(self) -> Result:
        """Run the rounds that are missing.

        The first SIGINT or SIGTERM ends it after the current sample, the second one at once. Either
        way, the file holds the finished rounds.

        Raises:
            UserError: The baseline cannot run, or the file cannot be written.
        """
        with StopSignals() as signals:
            try:
                self._first_round = self._finished_rounds
                self._start_workers(signals)
                self._make_rounds(signals)
            except KeyboardInterrupt:
                self.stopped_by = "SIGINT"
            finally:
                for worker in self._workers.values():
                    worker.close()
                self._workers.clear()
        if signals.received is not None:
            self.stopped_by = signals.received.name
        return self._result()

    def _restart_is_due(self, number: int) -> bool:
        made = number - self._first_round
        return made > 0 and made % self.experiment.rounds_until_restart == 0

    def _start_workers(self, signals: StopSignals) -> None:
        """Build and warm up all variants again, one after the other, before any is timed.

        Every other time they start in reverse order: what starts later was measured as 1% faster.
        """
        while self._workers:
            self._workers.popitem()[1].close()
        if self._finished_rounds >= self.experiment.rounds:
            return
        self._starts += 1
        for variant in self._variants[:: 1 if self._starts % 2 else -1]:
            record = self._records[variant.name]
            if signals.received is not None or record.unavailable:
                continue
            config = self.experiment.config_of(variant)
            record.unavailable = missing_need(variant, config, self._hardware)
            if record.unavailable:
                self._say(f"{variant.name}: not available here: {record.unavailable}")
                continue
            self._say(f"{variant.name}: building and warming up")
            try:
                worker = self._open_worker(variant, config, self._order(record.facts))
            except VariantFailure as failure:
                self._lose(variant, str(failure))
                continue
            self._workers[variant.name] = worker
            record.facts = worker.facts

    def _order(self, known: VariantFacts | None) -> dict[str, Any]:
        keys = ("measure", "steps", "seconds", "warmup_steps", "seeds")
        order = {key: getattr(self.experiment, key) for key in keys}
        # Measured only once, since it takes longer than a sample.
        order["peak"] = None if known is None else (known.peak_flops, known.peak_flops_source)
        return order

    def _make_rounds(self, signals: StopSignals) -> None:
        rounds = self.experiment.rounds
        progress = _Progress(
            rounds=rounds - self._finished_rounds,
            samples_per_round=len(self._workers),
            stream=self._stream,
        )
        with progress:
            for number in range(self._finished_rounds, rounds):
                if self._restart_is_due(number):
                    self._start_workers(signals)
                for variant in self._turns(number):
                    if signals.received is not None:
                        return
                    self._sample(variant, number)
                    progress.advance(variant.name)
                self._finished_rounds = number + 1
                save_result(self._result(), self.path)
                progress.end_round(number + 1, rounds)

    def _turns(self, number: int) -> list[Variant]:
        """A B C, then C B A: a machine that slows down then affects all variants alike."""
        turns = [variant for variant in self._variants if variant.name in self._workers]
        return turns if number % 2 == 0 else turns[::-1]

    def _sample(self, variant: Variant, number: int) -> None:
        try:
            measurement = self._measure(self._workers[variant.name], number)
            measurement.process = self._starts - 1
        except VariantFailure as failure:
            self._workers.pop(variant.name).close()
            self._lose(variant, str(failure))
        else:
            record = self._records[variant.name]
            record.measurements = [m for m in record.measurements if m.round < number]
            record.measurements.append(measurement)

    def _measure(self, worker: Worker, number: int) -> Measurement:
        if worker.facts.device != "cpu":
            return worker.sample(number)
        if self._quiet is None:
            self._quiet = QuietMachine(self.experiment.patience)
        # A whole run is too long to repeat, and long enough to average out disturbances.
        return self._quiet.sample(worker, number, may_retake=self.experiment.measure == "steps")

    def _lose(self, variant: Variant, reason: str) -> None:
        self._records[variant.name].unavailable = reason
        self._say(f"{variant.name}: not available here: {reason}")
        if variant.name == self.experiment.baseline_variant.name:
            raise UserError(
                f"{self.experiment.name}: the baseline {variant.name!r} cannot run: {reason}",
                "fix that, or choose another baseline",
            )

    def _result(self) -> Result:
        return assess(
            self.experiment, self._records, finished_rounds=self._finished_rounds, **self._origin
        )

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class _Progress:
    """On a terminal a bar with the time left; elsewhere one line for each round."""

    def __init__(self, *, rounds: int, samples_per_round: int, stream: TextIO) -> None:
        self._stream = stream
        self._rounds = rounds
        self._start = time.perf_counter()
        self._done = 0
        self._bar: tqdm | None = None
        if stream.isatty():
            self._bar = tqdm(
                total=rounds * samples_per_round, unit="sample", file=stream, dynamic_ncols=True
            )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, name: str) -> None:
        """A sample is taken."""
        if self._bar is not None:
            self._bar.set_description_str(name, refresh=False)
            self._bar.update()

    def end_round(self, number: int, rounds: int) -> None:
        """A round is finished and saved."""
        self._done += 1
        if self._bar is None:
            seconds = (time.perf_counter() - self._start) / self._done
            left = datetime.timedelta(seconds=round(seconds * (self._rounds - self._done)))
            print(f"round {number}/{rounds}  left {left}", file=self._stream, flush=True)


def _opener(experiment: Experiment) -> OpenWorker:
    if experiment.isolation == "shared":
        return lambda variant, config, order: InlineWorker(config, order)
    return lambda variant, config, order: ProcessWorker(
        config, order, environment=variant.environment
    )
