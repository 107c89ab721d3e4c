"""The `report` command: its flags and its output."""

import argparse
from pathlib import Path
from typing import Any

from training_framework.errors import UserError

__all__ = ["add_report"]

DEFAULT_OUTPUT = Path("report.html")


def add_report(commands: Any) -> None:
    """Add the command to a parser's subcommands, as `add_subparsers` gives them."""
    summary = "show result files as one HTML page, or as Markdown"
    parser = commands.add_parser("report", help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=_report, parser=parser)
    parser.add_argument(
        "results",
        metavar="RESULT.json",
        type=Path,
        nargs="+",
        help="result files of compare, tune, profile or benchmarks/record_run.py",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"the page ({DEFAULT_OUTPUT}); overwritten"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print Markdown; write a page only with --output"
    )


def _report(options: argparse.Namespace) -> None:
    from training_framework.measure.report.render import html_report, markdown_report
    from training_framework.measure.report.sources import read_source

    sources = [read_source(path) for path in options.results]
    try:
        page = html_report(sources)
        markdown = markdown_report(sources) if options.markdown else ""
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        # Each value has the right type, but together they may still be nonsense.
        raise UserError(
            f"{', '.join(map(str, options.results))}: cannot show these numbers ({error})",
            "name unmodified result files",
        ) from error
    print(markdown, end="")
    if options.output is not None or not options.markdown:
        output = options.output or DEFAULT_OUTPUT
        _write(output, page, options.results)
        if not options.markdown:
            print(f"report: {output}")


def _write(output: Path, text: str, results: list[Path]) -> None:
    from training_framework.runs.directory import write_text_atomically

    if output.resolve() in [path.resolve() for path in results]:
        raise UserError(f"--output {output}: is one of the result files", "name an .html file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(output, text)
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot be written to ({error.strerror})", "name another file"
        ) from None
