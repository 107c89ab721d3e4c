"""The `compare` command: its flags and its output."""

import argparse
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

from training_framework.config.flags import add_config_flags, given_settings
from training_framework.errors import UserError

__all__ = ["add_compare"]

# Settings that the experiment chooses itself.
SETTINGS_OF_A_RUN = ("run",)
EXIT_MARKED = 1
LINE_WIDTH = 80
SIGNAL_EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}


def add_compare(commands: Any) -> None:
    """Add the command to a parser's subcommands, as `add_subparsers` gives them."""
    from training_framework.config.schema import sections

    summary = "measure variants of a configuration side by side"
    parser = commands.add_parser("compare", help=summary, description=summary, allow_abbrev=False)
    parser.usage = (
        f"{parser.prog} EXPERIMENT [--SETTING VALUE ...]\n"
        f"       {parser.prog} --vary KEY=A,B [--base FILE] [...]\n"
        f"       {parser.prog} --ablate [--base FILE] [...]\n"
        f"       {parser.prog} --list"
    )
    parser.set_defaults(run=_compare, parser=parser)
    parser.add_argument(
        "experiment", nargs="?", help="experiment file (YAML), or the name of a shipped one"
    )
    parser.add_argument("--base", metavar="FILE", help="configuration to vary or ablate")
    parser.add_argument(
        "--vary",
        metavar="KEY=A,B,...",
        action="append",
        default=[],
        help="compare these values of a setting; given several times: all combinations",
    )
    parser.add_argument(
        "--ablate",
        action="store_true",
        help="measure each switch alone, and each one switched off among the others",
    )
    parser.add_argument("--list", action="store_true", help="list the shipped experiments")
    parser.add_argument("--output", type=Path, metavar="FILE", help="result file (JSON)")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="result file of a comparison to resume",
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if a check marks a result as doubtful"
    )
    parser.add_argument("--rounds", type=int, help="number of samples per variant")
    parser.add_argument("--steps", type=int, help="timed steps per sample")
    parser.add_argument("--seconds", type=float, help="length of a sample, instead of --steps")
    parser.add_argument("--dropped-steps", type=int, metavar="STEPS",
                        help="untimed steps before the first sample")  # fmt: skip
    parser.add_argument("--patience", type=float, metavar="X",
                        help="how long to wait for a quiet machine, as a multiple of the time "
                        "that the samples take (2; 0: never wait)")  # fmt: skip
    keys = [key for section, members in sections().items() for key in members
            if section not in SETTINGS_OF_A_RUN]  # fmt: skip
    add_config_flags(parser, keys)


def _compare(options: argparse.Namespace) -> int:
    from training_framework.measure.compare.comparison import Comparison
    from training_framework.measure.compare.table import result_lines

    if options.list:
        _print_shipped()
        return 0
    settings = given_settings(options)
    if options.resume is not None:
        _refuse_beside_resume(options, settings)
        comparison = Comparison.resume(options.resume, rounds=options.rounds)
    else:
        experiment = _experiment(options, settings)
        comparison = Comparison(
            experiment, path=_output_path(options.output, experiment), command=_own_command()
        )
    result = comparison.run()
    if result.rounds:
        print("\n".join([*result_lines(result), "", f"result file: {comparison.path}"]))
    if comparison.stopped_by:
        if result.rounds:
            print(
                f"stopped by {comparison.stopped_by} after {result.rounds} rounds; resume it with\n"
                f"  efficient-resnet compare --resume {shlex.quote(str(comparison.path))}"
            )
        return SIGNAL_EXIT_CODES.get(comparison.stopped_by, 1)
    marked = result.marks or any(variant.marks for variant in result.variants)
    return EXIT_MARKED if options.strict and marked else 0


def _print_shipped() -> None:
    from training_framework.measure.compare.experiment import load_experiment, shipped_experiments

    for name in shipped_experiments():
        head = f"{name:<24} "
        text = head + load_experiment(name).description
        print(textwrap.fill(text, LINE_WIDTH, subsequent_indent=" " * len(head)))


def _experiment(options: argparse.Namespace, settings: dict[str, Any]) -> Any:
    """The experiment that the flags describe: read from a file, or built from a configuration."""
    from training_framework.config.inheritance import canonical_settings, read_config_file
    from training_framework.measure.compare.experiment import load_experiment
    from training_framework.measure.compare.variations import ablation, variation
    from training_framework.train import configure, plan_for

    wishes = [bool(options.experiment), bool(options.vary), options.ablate]
    if sum(wishes) != 1:
        raise UserError(
            f"compare: {'more than one thing' if any(wishes) else 'nothing'} to compare is given",
            "give an experiment, --vary KEY=A,B or --ablate; --list shows the shipped experiments",
        )
    changes = _changes(options)
    if options.experiment:
        if options.base is not None:
            raise UserError(
                "compare: --base cannot be used with an experiment, which has its own base",
                "remove --base; override single settings by flags, such as --data-root DIR",
            )
        return load_experiment(options.experiment, settings, **changes)
    base = read_config_file(options.base) if options.base is not None else {}
    base.update(canonical_settings(settings, "command line"))
    if options.ablate:
        config = configure(options.base, settings, source="command line")
        plan, _, facts = plan_for(config)
        return ablation(base, plan, facts, **changes)
    return variation(base, [_axis(text) for text in options.vary], **changes)


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    given = {
        "rounds": options.rounds,
        "steps": options.steps,
        "seconds": options.seconds,
        "warmup_steps": options.dropped_steps,
        "patience": options.patience,
    }
    if options.seconds is not None and options.steps is not None:
        raise UserError("compare: --steps and --seconds are both given", "remove one of them")
    changes = {key: value for key, value in given.items() if value is not None}
    if options.seconds is not None:
        changes["steps"] = None
    return changes


def _axis(text: str) -> tuple[str, list[Any]]:
    """`batch_size=16,32` as a key and its values, typed as YAML would."""
    import yaml

    from training_framework.config.inheritance import parse_yaml

    key, equals, values = text.partition("=")
    if not equals or not key:
        raise UserError(f"--vary {text}: not KEY=A,B,...", "write --vary batch_size=16,32")
    try:
        return key.strip().replace("-", "_"), [parse_yaml(value) for value in values.split(",")]
    except (yaml.YAMLError, ValueError):
        raise UserError(f"--vary {text}: a value is not YAML", "write plain values") from None


def _output_path(output: Path | None, experiment: Any) -> Path:
    import torch

    from training_framework.measure.compare.environment import device_label
    from training_framework.measure.compare.result import result_file_name, unused_path

    if output is None:
        name = result_file_name(experiment.name, device_label(experiment), torch.__version__)
        return unused_path(Path("benchmarks/results") / name)
    if output.exists():
        raise UserError(
            f"--output {output}: already exists",
            "name another file, or use --resume",
        )
    return output


def _refuse_beside_resume(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    others = {
        "an experiment": options.experiment,
        "--base": options.base,
        "--vary": options.vary,
        "--ablate": options.ablate,
        "--output": options.output,
        "--steps": options.steps,
        "--seconds": options.seconds,
        "--dropped-steps": options.dropped_steps,
        "--patience": options.patience,
        **{f"--{key.replace('_', '-')}": True for key in settings},
    }
    given = [name for name, value in others.items() if value]
    if given:
        raise UserError(
            f"compare: {given[0]} cannot be used with --resume, which uses the file's settings",
            f"remove {given[0]}",
        )


def _own_command() -> str:
    return shlex.join(["efficient-resnet", *sys.argv[1:]])
