"""The `verify-resume` command: its flags and its output."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from training_framework.config.flags import add_config_flags, given_settings

if TYPE_CHECKING:
    from training_framework.measure.verify.verification import Verification

__all__ = ["add_verify_resume", "verification_lines"]

FAILED = 1


def add_verify_resume(commands: Any) -> None:
    """Add the command to a parser's subcommands, as `add_subparsers` gives them."""
    summary = "check that a stopped and resumed run ends like an uninterrupted one"
    parser = commands.add_parser(
        "verify-resume",
        help=summary,
        description=f"{summary}, bit for bit, with your settings and data; a GPU needs "
        "--deterministic. Exits with 1 if anything differs",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_verify, parser=parser)
    add_config_flags(parser)
    parser.usage = f"{parser.prog} [--config FILE] [--steps N] [...]"
    group = parser.add_argument_group("verification")
    group.add_argument("--steps", type=int, default=20, help="optimizer steps to compare (20)")
    group.add_argument("--stops", type=int, default=3, help="number of stops (3)")
    group.add_argument("--stop-seed", type=int, default=0, metavar="SEED",
                       help="seed that draws the steps at which to stop (0)")  # fmt: skip
    group.add_argument("--kill", action="store_true",
                       help="kill within a step, instead of stopping after it")  # fmt: skip


def _verify(options: argparse.Namespace) -> int:
    from training_framework.measure.verify.verification import verify_resume
    from training_framework.train import configure

    verification = verify_resume(
        configure(options.config, given_settings(options), source="command line"),
        steps=options.steps,
        stops=options.stops,
        stop_seed=options.stop_seed,
        kill=options.kill,
        say=lambda line: print(f"{line} ...", file=sys.stderr),
    )
    print("\n".join(verification_lines(verification)))
    return 0 if verification.passed else FAILED


def verification_lines(verification: "Verification") -> list[str]:
    """PASS and the compared parts, or FAIL and the differences."""
    comparison = verification.comparison
    how = "killed in" if verification.killed else "stopped after"
    runs = (
        f"{verification.steps} steps straight, and {how} "
        f"step{'s' if len(verification.stops) > 1 else ''} "
        f"{', '.join(map(str, verification.stops))} and resumed"
    )
    compared = [f"  {line}" for line in comparison.compared]
    if verification.passed:
        return [f"PASS: {runs}, are equal bit for bit", *compared]
    lines = [f"FAIL: {runs}, differ:", *(f"  {line}" for line in comparison.differences)]
    if verification.needs_determinism:
        lines.append("a GPU repeats a run bit for bit only with --deterministic")
    return [*lines, "compared:", *compared, f"both runs are kept in {verification.kept}"]
