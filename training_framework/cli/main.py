"""The command line: `efficient-resnet <command>`.

The flags of a configuration are made from TrainConfig's keys, and their values are read as those of
YAML files are, so both share names, checks and error messages.
"""

import argparse
import difflib
import errno
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from training_framework import __version__
from training_framework.cli.compare import add_compare
from training_framework.cli.data import add_inspect, add_pack
from training_framework.cli.estimate import add_estimate
from training_framework.cli.lr_range import add_lr_range
from training_framework.cli.profile import add_profile
from training_framework.cli.recipes import add_recipes
from training_framework.cli.report import add_report
from training_framework.cli.streams import discard_output, prepare_streams, say
from training_framework.cli.tune import add_tune
from training_framework.cli.verify import add_verify_resume
from training_framework.config.flags import add_config_flags, given_settings
from training_framework.errors import UserError, one_line
from training_framework.faults import check_fault_variable
from training_framework.machine.memory_shortage import memory_shortage

__all__ = ["main"]

USAGE_ERROR = 2
PROGRAM_FAULT = 70  # EX_SOFTWARE of sysexits.h
DEBUG_FLAG = "--debug"  # anywhere on the command line
SIGNAL_EXIT_CODES = {"SIGHUP": 129, "SIGINT": 130, "SIGTERM": 143}


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, which suggests the nearest command or flag."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if wrong:
            commands = re.findall(r"[\w-]+", wrong[2])
            raise UserError(
                f"{self.prog}: there is no command {wrong[1]!r}",
                _nearest_of(wrong[1], commands, f"choose from {', '.join(commands)}"),
            )
        raise UserError(f"{self.prog}: {message}", f"see `{self.prog} --help`")

    def refuse(self, unknown: str) -> NoReturn:
        """Report an argument that this command does not accept."""
        listing = f"`{self.prog} --help` lists them all"
        if unknown.startswith("-"):
            flag, _, _ = unknown.partition("=")
            known = [name for name in self._option_string_actions if name.startswith("--")]
            cure = _nearest_of(flag.replace("_", "-"), known, listing)
            raise UserError(f"{self.prog}: unknown flag {flag}", cure)
        if Path(unknown).suffix in (".yaml", ".yml"):
            listing = f"did you mean --config {unknown}?"
        raise UserError(f"{self.prog}: unexpected argument {unknown!r}", listing)


def _nearest_of(name: str, valid: Sequence[str], otherwise: str) -> str:
    match = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"did you mean {match[0]}?" if match else otherwise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: As on the command line, without the program's name; None: those of this process.

    Returns:
        The exit status: 0, 2 for bad input, 70 for a fault of the program itself, or 128 plus the
        number of the signal that ended a run.
    """
    prepare_streams()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG_FLAG in arguments
    if debug:
        arguments.remove(DEBUG_FLAG)
    try:
        check_fault_variable()
        _check_working_directory()
        return _run(arguments)
    except UserError as error:
        if debug:
            traceback.print_exc()
        return _report(error)
    except Exception as error:
        if debug:
            traceback.print_exc()
        text = one_line(f"{type(error).__name__}: {error}")
        say(f"error: {text}; this is a fault of the program: {_kept_traceback()}")
        return PROGRAM_FAULT


def _check_working_directory() -> None:
    """Refuse a deleted working directory: in one, the numerical libraries end the process."""
    try:
        Path.cwd()
    except OSError as error:
        raise UserError(
            f"the working directory cannot be used ({error.strerror})", "change to one that exists"
        ) from None


def _kept_traceback() -> str:
    """Write the current traceback to a file: a long run cannot be repeated just to see it."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="efficient-resnet-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(traceback.format_exc())
    except OSError:
        return f"please report the traceback that {DEBUG_FLAG} shows"
    return f"please report the traceback in {file.name} ({DEBUG_FLAG} shows it here)"


def _run(arguments: list[str]) -> int:
    try:
        options, unknown = _parser().parse_known_args(arguments)
        if unknown:
            options.parser.refuse(unknown[0])
        status = int(options.run(options) or 0)
        sys.stdout.flush()  # here, where a closed pipe is handled
        return status
    except KeyboardInterrupt:
        say("interrupted")
        return SIGNAL_EXIT_CODES["SIGINT"]
    except BrokenPipeError:  # the reader of our output has quit, as `| head` does
        discard_output()
        return 1
    except (OSError, RuntimeError, MemoryError) as error:
        shortage = _shortage(error)
        if shortage is None:
            raise
        raise shortage from error


def _report(error: UserError) -> int:
    """Print the error in one line; if several processes meet it, only the first one prints it."""
    first = True
    if "RANK" in os.environ:
        from training_framework.machine.distributed import is_first_to_report

        first = is_first_to_report(str(error))
    if first:
        say(f"error: {error}")
    return USAGE_ERROR


def _shortage(error: Exception) -> UserError | None:
    """The UserError for a full disk, full memory or too many open files; None for others."""
    too_many = os.strerror(errno.EMFILE)
    # PyTorch's loader says the same of its processes as a RuntimeError.
    if too_many in str(error) or getattr(error, "errno", None) == errno.ENFILE:
        return UserError(
            f"{getattr(error, 'filename', None) or 'a file of the run'}: {too_many}",
            "allow more open files (ulimit -n 1024), or lower num_workers",
        )
    if isinstance(error, OSError):
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            return None
        return UserError(
            f"{error.filename or 'a file of the run'}: cannot be written to ({error.strerror})",
            "free some space, then continue with --resume and the run's last.ckpt",
        )
    shortage = memory_shortage(error)
    if shortage is None:
        return None
    return UserError(
        f"memory is full: {shortage}",
        "lower batch_size or img_size, turn on activation_checkpointing, or turn off resident_data",
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="efficient-resnet",
        description="Train ResNets as fast as the machine allows, and measure it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        DEBUG_FLAG,
        action="store_true",
        help="show the traceback of an error (any command)",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser
    )
    _add_train(commands)
    _add_plan(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_data(commands)
    for add in (
        add_recipes, add_estimate, add_lr_range, add_compare, add_tune, add_report, add_profile,
        add_verify_resume,
    ):  # fmt: skip
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, allow_abbrev=False
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_train(commands: Any) -> None:
    parser = _command(commands, "train", _train, "train a ResNet")
    add_config_flags(parser)


def _add_plan(commands: Any) -> None:
    parser = _command(commands, "plan", _plan, "show what would run here and why, without training")
    add_config_flags(parser)


def _add_evaluate(commands: Any) -> None:
    parser = _command(commands, "evaluate", _evaluate, "evaluate a checkpoint on its or other data")
    parser.add_argument("checkpoint", type=Path, help=".ckpt or weights.safetensors of a run")
    add_config_flags(
        parser,
        ("data", "data_root", "batch_size", "accelerator", "precision", "threads", "num_workers",
         "on_bad_image", "tta"),
    )  # fmt: skip
    parser.usage = f"{parser.prog} CHECKPOINT [--SETTING VALUE ...]"


def _add_predict(commands: Any) -> None:
    parser = _command(commands, "predict", _predict, "classify images")
    parser.add_argument("checkpoint", type=Path, help=".ckpt or weights.safetensors of a run")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=3, help="number of classes to show for each (3)")
    add_config_flags(parser, ("accelerator", "precision", "threads", "on_bad_image"))


def _add_data(commands: Any) -> None:
    parser = commands.add_parser("data", help="work with data sets", allow_abbrev=False)
    actions = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser
    )
    subset = _command(actions, "subset", _subset, "copy a random subset of an image folder")
    subset.add_argument("source", type=Path, metavar="SRC", help="folder with train/ and val/")
    subset.add_argument("destination", type=Path, metavar="DEST", help="new folder")
    subset.add_argument("--classes", type=int, required=True, help="number of classes")
    subset.add_argument("--train-per-class", type=int, required=True, help="images per class")
    subset.add_argument("--val-per-class", type=int, required=True, help="images per class")
    subset.add_argument("--seed", type=int, default=0, help="seed of the choice (0)")
    add_pack(actions)
    add_inspect(actions)


def _configuration(options: argparse.Namespace) -> Any:
    from training_framework.train import configure

    return configure(
        getattr(options, "config", None), given_settings(options), source="command line"
    )


def _train(options: argparse.Namespace) -> int:
    from training_framework.cli.summary import result_lines
    from training_framework.train import main as train

    result = train(_configuration(options))
    if result.run_directory is not None:
        try:
            print("\n".join(result_lines(result)), flush=True)
        except OSError:
            if result.stopped_by != "SIGHUP":
                raise
            # The terminal is gone, hence the signal; the unwritten output must not fail again.
            discard_output()
    return SIGNAL_EXIT_CODES.get(result.stopped_by, 0)


def _plan(options: argparse.Namespace) -> None:
    from training_framework.cli.summary import plan_lines
    from training_framework.machine.distributed import Processes
    from training_framework.train import plan_for

    lines = plan_lines(*plan_for(_configuration(options)))
    if Processes.from_environment().is_first:
        print("\n".join(lines))


def _evaluate(options: argparse.Namespace) -> None:
    from training_framework.inference import evaluate_file
    from training_framework.machine.distributed import Processes

    evaluation, facts = evaluate_file(options.checkpoint, given_settings(options))
    metrics = evaluation.metrics
    if not Processes.from_environment().is_first:
        return
    skipped = facts.val_images - metrics.count
    if skipped:
        print(
            f"note: {skipped:,} of {facts.val_images:,} images are bad and were skipped",
            file=sys.stderr,
        )
    print(
        f"{facts.name}: {metrics.count:,} images  top-1 {metrics.acc1:.2f}%  "
        f"top-5 {metrics.acc5:.2f}%  loss {metrics.loss:.4f}  in {evaluation.seconds:.1f} s"
    )
    if evaluation.acc1_tta is not None:
        print(f"  with test-time augmentation: top-1 {evaluation.acc1_tta:.2f}%")


def _predict(options: argparse.Namespace) -> None:
    from training_framework.inference import predict_files

    if options.top < 1:
        raise UserError(f"--top is {options.top}", "give 1 or more")
    for path, ranking in predict_files(
        options.checkpoint, options.images, top=options.top, overrides=given_settings(options)
    ):
        classes = "  ".join(f"{name} {100 * share:.1f}%" for name, share in ranking)
        # A name that is not UTF-8 cannot be printed as it is.
        shown = os.fsencode(path).decode(errors="replace")
        print(f"{shown}: {classes}")


def _subset(options: argparse.Namespace) -> None:
    from training_framework.data.sources.subset import make_subset

    summary = make_subset(
        options.source,
        options.destination,
        classes=options.classes,
        train_per_class=options.train_per_class,
        val_per_class=options.val_per_class,
        seed=options.seed,
    )
    print(
        f"{summary.dest}: {summary.train_images} training and {summary.val_images} validation "
        f"images of {len(summary.classes)} classes ({', '.join(summary.classes)})"
    )
