"""Fill the generated blocks of README and docs, and draw the chart, from the result files.

    python benchmarks/render_docs.py          # rewrite what is stale
    python benchmarks/render_docs.py --check  # change nothing; exit with 1 if anything is stale

A block stands between `<!-- generated: NAME -->` and `<!-- end -->`. It shows the newest result
file of its experiment.
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for a test that imports this file

from claims import claims_table
from machines import JOBS, machine_table, peak_table, plan_reasons, plan_table
from result_tables import (
    decoding_accuracy,
    guarantees_price,
    input_speed,
    startup_time,
    step_overhead,
    step_phases,
)
from switches import switch_cards, switch_chart, switch_table, switch_worths

from training_framework.measure.compare.result import Result
from training_framework.measure.compare.table import result_lines
from training_framework.measure.report.render import html_report

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NOT_RECORDED = "Not recorded on a quiet machine yet.\n"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def newest_or_none(experiment: str) -> dict[str, Any] | None:
    """The newest result file; None if there is none."""
    files = sorted(RESULTS.glob(f"{experiment}_*.json"), key=lambda file: file.stem.split("_")[-1])
    if not files:
        return None
    result: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8"))
    return result


def newest(experiment: str) -> dict[str, Any]:
    """The newest result file."""
    result = newest_or_none(experiment)
    if result is None:
        sys.exit(f"no result of {experiment} in {RESULTS.relative_to(ROOT)}")
    return result


def machine(result: dict[str, Any]) -> str:
    """What a run ran on, in a few words."""
    plan, hardware = result["plan"], result["environment"]["hardware"]
    where = plan["device_name"]
    if plan["device"] == "cpu":
        where = f"{plan['threads']} threads of {hardware['cpu_name']}"
    return f"{where}, PyTorch {result['environment']['versions']['torch']}, {result['date']}"


def demo_output() -> str:
    """What the demo printed, without the rows logged between evaluations."""
    result = newest("demo")
    lines = [
        line for line in result["output"] if "images/s  data wait" not in line and line.strip()
    ]
    return "\n".join(["```", "$ make demo", *lines, "```", f"({machine(result)})"]) + "\n"


def runs() -> str:
    """The recorded training runs as a table."""
    rows = ["| run | data | top-1 | total time | training images/s |", "|---|---|---|---|---|"]
    for experiment in ("demo", "cifar10-short", "imagenet-tiny"):
        result = newest(experiment)
        reached = result["results"]
        rows.append(
            f"| `{result['command']}` | {result['dataset']} | {reached['last_acc1']:.2f}% "
            f"| {result['seconds']:.0f} s | {reached['images_per_second']:.0f} |"
        )
    return "\n".join([*rows, "", f"({machine(newest('cifar10-short'))})"]) + "\n"


def machine_of_comparison(result: dict[str, Any]) -> str:
    """What a comparison ran on, in a few words."""
    facts = next(row["facts"] for row in result["variants"] if row["facts"])
    where = facts["device_name"]
    if facts["device"] == "cpu":
        where = f"{facts['plan']['threads']} threads of {where}"
    versions = result["environment"]["versions"]
    return f"{where}, PyTorch {versions['torch']}, {result['started'][:10]}"


def comparison(experiment: str) -> str:
    """A comparison as `compare` prints it, and the command that repeats it."""
    result = newest_or_none(experiment)
    if result is None:
        return NOT_RECORDED
    _, _, *lines = result_lines(Result.model_validate(result))  # the page has its own headings
    return "\n".join([f"`{result['command']}`", "", *lines]) + "\n"


def guarantees() -> str:
    """What the guarantees cost, in seconds an epoch."""
    short, whole = (newest_or_none(f"reliability-price{kind}") for kind in ("-short", ""))
    return NOT_RECORDED if short is None or whole is None else guarantees_price(short, whole)


def table(experiment: str) -> str:
    """The table of a result file that is not a comparison; each such script has its own form."""
    result = newest_or_none(experiment)
    return NOT_RECORDED if result is None else OTHERS[experiment](result)


def decoding() -> str:
    """What decoding does to accuracy, for every recorded image size."""
    files = sorted(RESULTS.glob("decoding-accuracy-*px_*.json"))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return "\n".join(decoding_accuracy(result) for result in results) or NOT_RECORDED


def phases() -> str:
    """Where the time of a step goes, for both stems of ResNet-18."""
    profiles = (newest_or_none(f"profile-{stem}-stem") for stem in ("cifar", "imagenet"))
    found = [profile for profile in profiles if profile is not None]
    return step_phases(*found) if found else NOT_RECORDED


def tuned_grid() -> str:
    """How close `tune` came to the best of an exhaustive grid."""
    result = newest_or_none("tune-against-grid")
    if result is None:
        return NOT_RECORDED
    _, _, *lines = result_lines(Result.model_validate(result["grid"]))
    return (
        f"`{result['command']}`\n\ntune chose {result['chosen']}: {result['share_of_best']:.1%} "
        f"of the speed of the grid's best, {result['best']}.\n\n" + "\n".join(lines) + "\n"
    )


def controls() -> str:
    """Every recorded run of the A/A control."""
    if newest_or_none("aa-control") is None:
        return NOT_RECORDED
    rows = ["| run | speed against itself [95%] | pairs | marks |", "|---|---|---|---|"]
    for number, file in enumerate(sorted(RESULTS.glob("aa-control_*.json")), start=1):
        result = json.loads(file.read_text(encoding="utf-8"))
        (ratio,) = result["ratios"]
        marks = [mark for row in [result, *result["variants"]] for mark in row["marks"]]
        rows.append(
            f"| {number} | {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] "
            f"| {ratio['pairs']} | {', '.join(dict.fromkeys(marks)) or '-'} |"
        )
    return "\n".join([*rows, "", f"({machine_of_comparison(newest('aa-control'))})"]) + "\n"


def planted() -> str:
    """What `compare` found of a planted slowdown."""
    result = newest_or_none("planted-slowdown")
    if result is None:
        return NOT_RECORDED
    rows = [
        f"| run | slowdown of {result['planted']:.0%} [95%] | control [95%] |",
        "|---|---|---|",
    ]
    for number, run in enumerate(result["runs"], start=1):
        cells = (
            f"{run[name]['median']:.3f} [{run[name]['low']:.3f}, {run[name]['high']:.3f}]"
            for name in ("slowdown", "control")
        )
        rows.append(f"| {number} | {' | '.join(cells)} |")
    return "\n".join([*rows, ""])


def switches() -> str:
    """What each switch gains."""
    result = newest_or_none("ablation")
    if result is None:
        return NOT_RECORDED
    facts = next(row["facts"] for row in result["variants"] if row["facts"])
    where = (
        f"({facts['plan']['global_batch_size']} images of {facts['image_size']} px a step, "
        f"{machine_of_comparison(result)})"
    )
    return f"{switch_table(switch_worths(result))}\n{where}\n"


def chart() -> str | None:
    """The chart of the switches; None if there is no result."""
    result = newest_or_none("ablation")
    if result is None:
        return None
    return switch_chart(switch_worths(result), machine_of_comparison(result))


COMPARISONS = (
    "ablation", "baseline-vs-optimized", "batch-sweep", "compiled", "data-loading",
    "fastest-against-plain", "framework-check", "hardware-ladder", "native-kernels",
    "reliability-price", "step-speed-cifar-stem", "step-speed-imagenet-stem",
    "step-speed-lightning", "step-speed-lightning-tiny", "step-speed-memory",
    "step-speed-resnet50", "switch-accuracy", "tune-against-plain",
)  # fmt: skip
OTHERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "decode-speed": input_speed,
    "startup-time": startup_time,
    "step-overhead": step_overhead,
}
BLOCKS: dict[str, Callable[[], str]] = {
    "demo-output": demo_output,
    "runs": runs,
    "switches": switches,
    "switch-cards": switch_cards,
    "claims": lambda: claims_table(newest_or_none),
    "controls": controls,
    "reliability-price-short": guarantees,
    "tune-against-grid": tuned_grid,
    "planted": planted,
    "decoding-accuracy": decoding,
    "step-phases": phases,
    "machines": machine_table,
    "machines-cifar10": lambda: plan_table(JOBS[0]),
    "machines-imagenet": lambda: plan_table(JOBS[1]),
    "machine-reasons": plan_reasons,
    "peaks": peak_table,
    **{name: functools.partial(comparison, name) for name in COMPARISONS},
    **{name: functools.partial(table, name) for name in OTHERS},
}
CHARTS: dict[Path, Callable[[], str | None]] = {ROOT / "docs" / "switches.svg": chart}
REPORTS = (
    "ablation", "baseline-vs-optimized", "batch-sweep", "framework-check", "hardware-ladder",
    "switch-accuracy",
)  # fmt: skip
SVG = re.compile(r"<svg.*?</svg>", re.DOTALL)


def reports() -> dict[Path, str]:
    """The HTML report of each comparison that has a page."""
    results = {name: Result.model_validate(newest(name)) for name in REPORTS}
    folder = ROOT / "docs" / "reports"
    return {folder / f"{name}.html": html_report([result]) for name, result in results.items()}


def says_the_same(path: Path, text: str) -> bool:
    """Whether a file holds the text; charts may differ, since another matplotlib may draw them."""
    if not path.exists():
        return False
    held = path.read_text(encoding="utf-8")
    return held == text or (path.suffix == ".html" and SVG.sub("", held) == SVG.sub("", text))


def rendered(text: str) -> str:
    """The document with its blocks filled."""
    return BLOCK.sub(lambda match: match[1] + BLOCKS[match[2]]() + match[4], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    stale = []
    texts = {document: document.read_text(encoding="utf-8") for document in DOCUMENTS}
    fresh = {document: rendered(text) for document, text in texts.items()}
    fresh |= {path: text for path, draw in CHARTS.items() if (text := draw()) is not None}
    fresh |= reports()
    for path, text in fresh.items():
        if not says_the_same(path, text):
            stale.append(str(path.relative_to(ROOT)))
            if not options.check:
                path.write_text(text, encoding="utf-8")
    if stale:
        print(("stale: " if options.check else "rewritten: ") + ", ".join(stale))
    return int(bool(stale) and options.check)


if __name__ == "__main__":
    sys.exit(main())
