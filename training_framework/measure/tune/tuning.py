"""The fastest measured settings for a configuration on this machine, with their evidence."""

import datetime
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from training_framework.config.inheritance import Setting, canonical_settings, read_config_file
from training_framework.config.loading import build_config
from training_framework.errors import UserError
from training_framework.measure.compare.comparison import Comparison, OpenWorker
from training_framework.measure.compare.environment import environment_of, source_commit
from training_framework.measure.compare.experiment import CONTROL, make_experiment
from training_framework.measure.compare.quiet import QuietMachine
from training_framework.measure.compare.result import Result, save_result
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
from training_framework.measure.tune.tuned_yaml import write_tuned_yaml
from training_framework.plan import TrainPlan
from training_framework.train import plan_for

__all__ = ["accepts", "tune"]

TUNED = "tuned"
SECONDS_OF_A_TRIAL = 120.0
# The rest of the time is for the confirmation.
SEARCH_SHARE = 0.6
# Waiting for a quiet machine, in times of what the trials themselves take.
PATIENCE = 1.0
CONFIRMATION_SECONDS = 2.0


def tune(
    config: str | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    output: Path,
    most_trials: int = 32,
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

    Where the winner's gain is within noise, the default stays. The search is seeded by the
    configuration's `seed`.

    Args:
        config: YAML file or shipped name, which the YAML that is written extends.
        settings: Settings that win over it, and go into that YAML too.
        output: The YAML to write; its evidence goes beside it, with the ending `.json`.
        most_trials: Limit of trials.
        budget_seconds: Limit of the time, of which the confirmation gets two fifths; the trial or
            round under way is finished. None for no limit.
        memory_limit_bytes: Of the device's memory, or of the process's on a CPU.
        allow_batch_change: Whether the images of an optimizer step may change.
        keep: Keys that stay as they are.
        rounds: Of the confirmation; from 6 on its interval covers 95%.
        command: What repeats it, for the evidence.
        open_worker: Starts trials and variants; None: processes.
        clock: Seconds, for the budget.
        stream: Where progress goes; None: standard error.

    Raises:
        UserError: Something given is wrong, a file is in the way, or the default cannot run.
        KeyboardInterrupt: A signal ended it; the evidence so far is in its file.
    """
    given = canonical_settings(settings or {}, "command line")
    base = {**({} if config is None else read_config_file(config)), **given}
    evidence = output.with_suffix(".json")
    _check(base, output, evidence)
    plan, hardware, facts = plan_for(build_config(base))
    dimensions = tuning_space(
        build_config(base), plan, hardware, facts, allow_batch_change=allow_batch_change, keep=keep
    )
    result = TuningResult(
        experiment=f"tune-{build_config(base).model}-{facts.name}",
        command=command,
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=source_commit(),
        environment=environment_of(hardware),
        seed=build_config(base).seed,
        most_trials=most_trials,
        budget_seconds=budget_seconds,
        memory_limit_bytes=memory_limit_bytes,
        settings=_plain(base),
        dimensions={d.name: [name for name, _ in d.values] for d in dimensions},
    )
    winner = _find_winner(
        result,
        base,
        dimensions,
        plan=plan,
        evidence=evidence,
        open_worker=open_worker,
        clock=clock,
        stream=stream,
    )
    result.verdict = "The plan's own choices came out first: nothing to change."
    if any(winner):
        result.winner = candidate_settings(dimensions, winner)
        result.confirmation = _confirm(base, result, rounds, open_worker, stream)
        name = candidate_name(dimensions, winner)
        result.chosen, result.verdict = _decide(result, name, plan.total_steps)
    result.complete = True
    save_result(result, evidence)
    write_tuned_yaml(result, config, _plain(given), output)
    return result


def _find_winner(
    result: TuningResult,
    base: Mapping[str, Setting],
    dimensions: Sequence[Dimension],
    *,
    plan: TrainPlan,
    evidence: Path,
    open_worker: OpenWorker | None,
    clock: Callable[[], float],
    stream: TextIO | None,
) -> Candidate:
    """Make the trials, keeping each in the evidence's file."""

    def keep_trials(trials: list[Trial]) -> None:
        result.trials = list(trials)
        save_result(result, evidence)

    runner = TrialRunner(
        base,
        dimensions,
        total_images=plan.total_steps * plan.images_per_step,
        memory_limit_bytes=result.memory_limit_bytes,
        open_worker=open_worker or _trial_opener(plan, result.memory_limit_bytes),
        keep=keep_trials,
        quiet=QuietMachine(PATIENCE) if plan.device == "cpu" and open_worker is None else None,
        stream=stream,
    )
    started, budget = clock(), SEARCH_SHARE * (result.budget_seconds or math.inf)
    ranking = search(
        dimensions,
        runner,
        most_trials=result.most_trials,
        seed=result.seed,
        time_share=lambda: (clock() - started) / budget,
    )
    # Without a trial that was fit, the first one would have raised.
    return ranking[0]


def _check(base: Mapping[str, Setting], output: Path, evidence: Path) -> None:
    for path in (output, evidence):
        if path.exists():
            raise UserError(f"--output {output}: {path} exists already", "name another file")
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output {output}: is no YAML file's name", "end it with .yaml")
    for key in ("resume", "stop_after_steps"):
        if key in base and base[key].value is not None:
            raise UserError(f"{base[key].source}: {key} has no place in tuning", f"drop {key}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("tune: runs in one process", "start it without torchrun")


def _trial_opener(plan: TrainPlan, memory_limit_bytes: int | None) -> OpenWorker:
    # A GPU's memory is not its process's: there the peak is looked at after the trial.
    limit = memory_limit_bytes if plan.device == "cpu" else None
    return limited_worker(SECONDS_OF_A_TRIAL, limit or 0)


def _plain(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Values as YAML and JSON hold them."""
    plain: dict[str, Any] = {}
    for key, (value, _) in settings.items():
        listed = list(value) if isinstance(value, tuple) else value
        plain[key] = str(listed) if isinstance(listed, Path) else listed
    return plain


def _confirm(
    base: Mapping[str, Setting],
    tuning: TuningResult,
    rounds: int,
    open_worker: OpenWorker | None,
    stream: TextIO | None,
) -> Result:
    """The winner and the plan's default in paired turns, with an A/A control."""
    seconds = CONFIRMATION_SECONDS
    if tuning.budget_seconds is not None:
        share = (1 - SEARCH_SHARE) * tuning.budget_seconds / (3 * rounds)
        seconds = min(CONFIRMATION_SECONDS, max(0.5, share))
    experiment = make_experiment(
        {
            "name": "tune-confirmation",
            "variants": [{"name": AS_PLANNED}, {"name": TUNED, "overrides": tuning.winner}],
            "rounds": rounds,
            "seconds": seconds,
            "may_differ": ["images_per_step"] if _changes_step(base, tuning.winner) else [],
        },
        base,
        source="tune",
    )
    with tempfile.TemporaryDirectory(prefix="efficient-resnet-") as folder:
        comparison = Comparison(
            experiment,
            path=Path(folder) / "confirmation.json",
            command=tuning.command,
            open_worker=open_worker,
            stream=stream,
        )
        result = comparison.run()
    if comparison.stopped_by:
        raise KeyboardInterrupt(comparison.stopped_by)
    return result


def _changes_step(base: Mapping[str, Setting], winner: Mapping[str, Any]) -> bool:
    config = build_config(base)
    batch = winner.get("batch_size", config.batch_size)
    accumulate = winner.get("accumulate_grad_batches", config.accumulate_grad_batches)
    return bool(batch * accumulate != config.batch_size * config.accumulate_grad_batches)


def accepts(confirmation: Result, total_steps: int) -> bool:
    """Whether a confirmation shows that the tuned settings are worth their change.

    The whole interval must lie above 1, the gain must exceed what the A/A control differs from
    itself, and a longer start must pay within the run.
    """
    ratio, control = confirmation.ratio_of(TUNED), confirmation.ratio_of(CONTROL)
    if ratio is None or ratio.low is None or ratio.low <= 1:
        return False
    if control is not None and control.high is not None and ratio.median <= control.high:
        return False
    tuned = next(variant for variant in confirmation.variants if variant.name == TUNED)
    planned = next(variant for variant in confirmation.variants if variant.name == AS_PLANNED)
    # Only a compiler's start is long enough to tell it from noise.
    compiles = [bool(v.facts and v.facts.plan["compile"]) for v in (tuned, planned)]
    repaid = tuned.repays_after_steps
    return not any(compiles) or repaid is None or repaid <= total_steps


def _decide(tuning: TuningResult, name: str, total_steps: int) -> tuple[dict[str, Any], str]:
    """The settings to train with, and why, in a line."""
    confirmation = tuning.confirmation
    assert confirmation is not None
    ratio = confirmation.ratio_of(TUNED)
    if ratio is None:
        return {}, f"The winner ({name}) could not be confirmed: the plan's own choices stay."
    interval = f"{ratio.median:.3f}"
    if ratio.low is not None and ratio.high is not None:
        interval += f" [{ratio.low:.3f}, {ratio.high:.3f}]"
    if accepts(confirmation, total_steps):
        verdict = f"{name}: {interval} times as fast as planned, over {ratio.pairs} paired turns."
        return tuning.winner, verdict
    return {}, (
        f"The winner ({name}) is {interval} times as fast as planned in paired turns, which is no "
        "proven gain over the whole run. The plan's own choices stay."
    )
