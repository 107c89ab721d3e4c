"""The command line: `efficient-resnet <command>`.

Flags of a configuration are made from TrainConfig's own keys, and their values go the way that
values of YAML files go, so both have one set of names, checks and error messages.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from training_framework.errors import UserError

__all__ = ["main"]

USAGE_ERROR = 2
SIGNAL_EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}", f"`{self.prog} --help` explains")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: As on the command line, without the program's name; None takes it from there.

    Returns:
        The exit status: 0, 2 for bad input, or 128 and the number of the signal that ended a run.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parser().parse_args(arguments)
        return int(options.run(options) or 0)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes one says it
            print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return SIGNAL_EXIT_CODES["SIGINT"]
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="efficient-resnet",
        description="Train ResNets as fast as the machine allows, and measure it.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser
    )
    _add_train(commands)
    _add_plan(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_data(commands)
    return parser


def _command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def _add_train(commands: Any) -> None:
    parser = _command(commands, "train", _train, "train a ResNet")
    _add_config_flags(parser)


def _add_plan(commands: Any) -> None:
    parser = _command(commands, "plan", _plan, "show what would run here and why; train nothing")
    _add_config_flags(parser)


def _add_evaluate(commands: Any) -> None:
    parser = _command(commands, "evaluate", _evaluate, "evaluate a checkpoint on a data set")
    parser.add_argument("checkpoint", type=Path, help=".ckpt or weights.safetensors of a run")
    _add_config_flags(
        parser, ("data", "data_root", "batch_size", "accelerator", "precision", "num_workers")
    )


def _add_predict(commands: Any) -> None:
    parser = _command(commands, "predict", _predict, "name what pictures show")
    parser.add_argument("checkpoint", type=Path, help=".ckpt or weights.safetensors of a run")
    parser.add_argument("pictures", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=3, help="classes to show for each (3)")
    _add_config_flags(parser, ("accelerator", "precision"))


def _add_data(commands: Any) -> None:
    parser = commands.add_parser("data", help="work with data sets", allow_abbrev=False)
    actions = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser
    )
    subset = _command(actions, "subset", _subset, "copy a random subset of an image folder")
    subset.add_argument("source", type=Path, metavar="SRC", help="folder with train/ and val/")
    subset.add_argument("destination", type=Path, metavar="DEST", help="new folder")
    subset.add_argument("--classes", type=int, required=True, help="number of classes")
    subset.add_argument("--train-per-class", type=int, required=True, help="training images each")
    subset.add_argument("--val-per-class", type=int, required=True, help="validation images each")
    subset.add_argument("--seed", type=int, default=0, help="seed of the choice (0)")


def _add_config_flags(parser: argparse.ArgumentParser, keys: Sequence[str] | None = None) -> None:
    """A flag for every key of TrainConfig, or for the given ones; unset flags leave no trace."""
    from training_framework.config.names import ALIASES
    from training_framework.config.schema import TrainConfig, sections

    if keys is None:
        parser.add_argument(
            "--config", metavar="FILE", help="YAML file, or the name of a shipped one"
        )
    names = {key: [key, *(a for a, target in ALIASES.items() if target == key)] for key in
             TrainConfig.model_fields}  # fmt: skip
    for section, members in sections().items():
        group = parser.add_argument_group(section)
        for key in members:
            if keys is not None and key not in keys:
                continue
            field = TrainConfig.model_fields[key]
            default = "" if field.default is None else f" ({_shown(field.default)})"
            for name in names[key]:
                group.add_argument(
                    _flag(name),
                    dest=f"setting:{name}",
                    default=argparse.SUPPRESS,
                    nargs="?",
                    const="true",
                    metavar="VALUE",
                    help=(field.description or "").replace("%", "%%") + default
                    if name == key
                    else argparse.SUPPRESS,
                )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The settings given as flags, with the types that YAML would give them."""
    settings = {}
    for name, text in vars(options).items():
        _, found, key = name.partition("setting:")
        if found:
            settings[key] = _value(key, text)
    return settings


def _value(key: str, text: str) -> Any:
    import yaml

    from training_framework.config.inheritance import parse_yaml
    from training_framework.config.names import canonical

    if text in ("null", "none", "None") and text == "null":
        return None
    if canonical(key, None)[0] == "milestones":
        text = f"[{text.strip('[]')}]"
    elif canonical(key, None)[0] in ("name", "data_root", "output_dir", "weights", "resume"):
        return text
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, ValueError):
        return text


def _configuration(options: argparse.Namespace) -> Any:
    from training_framework.train import configure

    return configure(getattr(options, "config", None), _overrides(options), source="command line")


def _train(options: argparse.Namespace) -> int:
    from training_framework.summary import result_lines
    from training_framework.train import main as train

    result = train(_configuration(options))
    if result.run_directory is not None:
        print("\n".join(result_lines(result)))
    return SIGNAL_EXIT_CODES.get(result.stopped_by, 0)


def _plan(options: argparse.Namespace) -> None:
    from training_framework.summary import plan_lines
    from training_framework.train import plan_for

    print("\n".join(plan_lines(*plan_for(_configuration(options)))))


def _evaluate(options: argparse.Namespace) -> None:
    from training_framework.inference import evaluate_file

    evaluation, facts = evaluate_file(options.checkpoint, _overrides(options))
    metrics = evaluation.metrics
    print(
        f"{facts.name}: {metrics.count:,} images  top-1 {metrics.acc1:.2f}%  "
        f"top-5 {metrics.acc5:.2f}%  loss {metrics.loss:.4f}  in {evaluation.seconds:.1f} s"
    )


def _predict(options: argparse.Namespace) -> None:
    from training_framework.inference import predict_files

    if options.top < 1:
        raise UserError(f"--top is {options.top}", "give 1 or more")
    for path, ranking in predict_files(
        options.checkpoint, options.pictures, top=options.top, overrides=_overrides(options)
    ):
        classes = "  ".join(f"{name} {100 * share:.1f}%" for name, share in ranking)
        print(f"{path}: {classes}")


def _subset(options: argparse.Namespace) -> None:
    from training_framework.data.subset import make_subset

    summary = make_subset(
        options.source,
        options.destination,
        classes=options.classes,
        train_per_class=options.train_per_class,
        val_per_class=options.val_per_class,
        seed=options.seed,
    )
    print(summary)
