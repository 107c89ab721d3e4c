"""The fastest measured settings for a configuration on this machine, with their evidence."""

import datetime
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml
from pydantic_core import to_jsonable_python

from training_framework.config.inheritance import Setting, canonical_settings, read_config_file
from training_framework.config.loading import build_config
from training_framework.errors import UserError
from training_framework.measure.compare.comparison import Comparison, OpenWorker
from training_framework.measure.compare.environment import environment_of, source_commit
from training_framework.measure.compare.experiment import CONTROL, Experiment, make_experiment
from training_framework.measure.compare.quiet import QuietMachine
from training_framework.measure.compare.result import Result, save_result
from training_framework.measure.compare.table import interval
from training_framework.measure.tune.result import Trial, TuningResult
from training_framework.measure.tune.search import (
    AS_PLANNED,
    Candidate,
    Dimension,
    candidate_name,
    candidate_settings,
    search,
)
from training_framework.measure.tune.space import tuning_space
from training_framework.measure.tune.trials import TrialRunner, limited_worker
from training_framework.plan import TrainPlan
from training_framework.runs.directory import write_text_atomically
from training_framework.train import plan_for

__all__ = ["accepts", "tune"]

TUNED = "tuned"
SECONDS_OF_A_TRIAL = 120.0
# The confirmation gets the rest of the time.
SEARCH_SHARE = 0.6
# Time for waiting for a quiet machine, as a multiple of the trials' own time.
PATIENCE = 1.0
CONFIRMATION_SECONDS = 2.0


def tune(
    config: str | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    output: Path,
    max_trials: int = 32,
    budget_seconds: float | None = None,
    memory_limit_bytes: int | None = None,
    allow_batch_change: bool = False,
    keep: Sequence[str] = (),
    rounds: int = 6,
    command: str = "",
    open_worker: OpenWorker | None = None,
    clock: Callable[[], float] = time.monotonic,
    stream: TextIO | None = None,
) -> TuningResult:
    """Search, confirm the winner in paired turns with the plan's default, and write both files.

    If the winner's gain is within noise, the default stays.

    Args:
        config: YAML file or shipped name; the written YAML extends it.
        settings: Settings that override it; the written YAML contains them too.
        output: The YAML to write; its evidence goes beside it, with the suffix `.json`.
        max_trials: Maximum number of trials.
        budget_seconds: Time limit; the confirmation gets two fifths of it. A trial or round that
            has begun is finished. None for no limit.
        memory_limit_bytes: Limit of the device's memory, or of the process's memory on a CPU.
        allow_batch_change: Whether the images of an optimizer step may change.
        keep: Keys that stay as they are.
        rounds: Rounds of the confirmation; from 6 on, its interval covers 95%.
        command: The command that repeats it, for the evidence.
        open_worker: Starts trials and variants; None: in processes.
        clock: Returns seconds, for the budget.
        stream: Where progress goes; None: standard error.

    Raises:
        UserError: An argument is wrong, an output file exists, or the default cannot run.
        KeyboardInterrupt: A signal ended the search; its file holds the evidence so far.
    """
    given = canonical_settings(settings or {}, "command line")
    base = {**({} if config is None else read_config_file(config)), **given}
    evidence = output.with_suffix(".json")
    _check(base, output, evidence)
    planned = build_config(base)
    plan, hardware, facts = plan_for(planned)
    space = tuning_space(
        planned, plan, hardware, facts, allow_batch_change=allow_batch_change, keep=keep
    )
    result = TuningResult(
        experiment=f"tune-{planned.model}-{facts.name}",
        command=command,
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=source_commit(),
        environment=environment_of(hardware),
        max_trials=max_trials,
        budget_seconds=budget_seconds,
        memory_limit_bytes=memory_limit_bytes,
        settings=_plain(base),
        dimensions={d.name: [name for name, _ in d.values] for d in space},
    )
    winner = _search(
        result, plan, base, space, evidence, open_worker=open_worker, clock=clock, stream=stream
    )
    if any(winner):
        result.winner = candidate_settings(space, winner)
        against_plan = _confirmation(result, base, rounds, allow_batch_change=allow_batch_change)
        result.confirmation = _confirm(against_plan, command, open_worker, stream)
        if accepts(result.confirmation, plan.total_steps):
            result.chosen = result.winner
    result.verdict = _verdict(result, candidate_name(space, winner))
    result.complete = True
    save_result(result, evidence)
    _write_yaml(result, config, _plain(given), output)
    return result


def _search(
    result: TuningResult,
    plan: TrainPlan,
    base: Mapping[str, Setting],
    dimensions: Sequence[Dimension],
    evidence: Path,
    *,
    open_worker: OpenWorker | None,
    clock: Callable[[], float],
    stream: TextIO | None,
) -> Candidate:
    """The fastest combination found; every trial is kept in `result` and in the evidence."""

    def keep_trials(trials: list[Trial]) -> None:
        result.trials = list(trials)
        save_result(result, evidence)

    on_cpu, memory_limit = plan.device == "cpu", result.memory_limit_bytes
    runner = TrialRunner(
        base=base,
        dimensions=dimensions,
        total_images=plan.total_steps * plan.images_per_step,
        memory_limit_bytes=memory_limit,
        # A GPU's memory is not the process's: there the peak is checked after the trial.
        open_worker=open_worker
        or limited_worker(SECONDS_OF_A_TRIAL, (on_cpu and memory_limit) or 0),
        keep=keep_trials,
        quiet=QuietMachine(PATIENCE) if on_cpu and open_worker is None else None,
        stream=stream,
    )
    started, budget = clock(), SEARCH_SHARE * (result.budget_seconds or math.inf)
    # Never empty: if the plan's own choice cannot run, the first trial raises.
    winner, *_ = search(
        dimensions,
        runner,
        max_trials=result.max_trials,
        time_share=lambda: (clock() - started) / budget,
    )
    return winner


def _confirmation(
    result: TuningResult, base: Mapping[str, Setting], rounds: int, *, allow_batch_change: bool
) -> Experiment:
    """The winner against the plan's own choices, within what is left of the time limit."""
    seconds = CONFIRMATION_SECONDS
    if result.budget_seconds is not None:
        share = (1 - SEARCH_SHARE) * result.budget_seconds / (3 * rounds)
        seconds = min(CONFIRMATION_SECONDS, max(0.5, share))
    content = {
        "name": "tune-confirmation",
        "variants": [{"name": AS_PLANNED}, {"name": TUNED, "overrides": result.winner}],
        "rounds": rounds,
        "seconds": seconds,
        "may_differ": ["images_per_step"] if allow_batch_change else [],
    }
    return make_experiment(content, base, source="tune")


def _check(base: Mapping[str, Setting], output: Path, evidence: Path) -> None:
    for path in (output, evidence):
        if path.exists():
            raise UserError(f"--output {output}: {path} exists already", "name another file")
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output {output}: not the name of a YAML file", "end it with .yaml")
    for key in ("resume", "stop_after_steps"):
        if key in base and base[key].value is not None:
            raise UserError(f"{base[key].source}: tune cannot use {key}", f"remove {key}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("tune: runs in one process", "start it without torchrun")


def _plain(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Values that YAML and JSON can hold."""
    plain: dict[str, Any] = to_jsonable_python({key: s.value for key, s in settings.items()})
    return plain


def _confirm(
    experiment: Experiment, command: str, open_worker: OpenWorker | None, stream: TextIO | None
) -> Result:
    """The winner and the plan's default in paired turns, with an A/A control."""
    with tempfile.TemporaryDirectory(prefix="efficient-resnet-") as folder:
        comparison = Comparison(
            experiment,
            path=Path(folder) / "confirmation.json",
            command=command,
            open_worker=open_worker,
            stream=stream,
        )
        result = comparison.run()
    if comparison.stopped_by:
        raise KeyboardInterrupt(comparison.stopped_by)
    return result


def accepts(confirmation: Result, total_steps: int) -> bool:
    """Whether a confirmation shows that the tuned settings are worth the change.

    The whole interval must lie above 1, the gain must exceed the upper end of the A/A control, and
    a longer start must pay off within the run.
    """
    ratio, control = confirmation.ratio_of(TUNED), confirmation.ratio_of(CONTROL)
    if ratio is None or ratio.low is None or ratio.low <= 1:
        return False
    if control is not None and control.high is not None and ratio.median <= control.high:
        return False
    tuned = next(variant for variant in confirmation.variants if variant.name == TUNED)
    planned = next(variant for variant in confirmation.variants if variant.name == AS_PLANNED)
    # Only a compiler's start is long enough to stand out from noise.
    compiles = [bool(v.facts and v.facts.plan["compile"]) for v in (tuned, planned)]
    repaid = tuned.repays_after_steps
    return not any(compiles) or repaid is None or repaid <= total_steps


def _verdict(result: TuningResult, name: str) -> str:
    """What the trials, or the confirmation of the winner, say: in one line."""
    if result.confirmation is None:
        if any(trial.overrides for trial in result.trials):
            return "The plan's own choices are the fastest: nothing to change."
        return "Nothing but the plan's own choices was tried: raise --trials or --budget-seconds."
    ratio = result.confirmation.ratio_of(TUNED)
    if ratio is None:
        return f"The winner ({name}) could not be confirmed: the plan's own choices stay."
    if result.chosen:
        return (
            f"{name}: {interval(ratio)} times as fast as planned, over {ratio.pairs} paired turns."
        )
    return (
        f"The winner ({name}) is {interval(ratio)} times as fast as planned in paired turns. This "
        "does not prove a gain over the whole run, so the plan's own choices stay."
    )


def _write_yaml(
    tuning: TuningResult, extends: str | None, settings: Mapping[str, Any], output: Path
) -> None:
    """Write the chosen settings as a file to train from; it extends the tuned configuration."""
    content: dict[str, Any] = {}
    if extends is not None:
        file = Path(extends).expanduser()
        here = output.resolve().parent
        content["extends"] = os.path.relpath(file.resolve(), here) if file.is_file() else extends
    content |= {**settings, **tuning.chosen}
    remarks = [tuning.verdict, f"Evidence: {output.with_suffix('.json').name}"]
    if "batch_size" in tuning.chosen:
        remarks.append("Batch norm sees batches of another size: compare the accuracy too.")
    comment = "".join(f"# {line}\n" for line in remarks)
    text = comment + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    try:
        write_text_atomically(output, text)
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot be written to ({error.strerror})", "name another file"
        ) from None
