"""Fill the generated blocks of README and docs from the result files.

    python benchmarks/render_docs.py          # rewrite them
    python benchmarks/render_docs.py --check  # exit with 1 where a block differs from its source

A block stands between `<!-- generated: NAME -->` and `<!-- end -->`. The newest result file of an
experiment counts.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def newest(experiment: str) -> dict[str, Any]:
    """The result file of the latest date."""
    files = sorted(RESULTS.glob(f"{experiment}_*.json"), key=lambda file: file.stem.split("_")[-1])
    if not files:
        sys.exit(f"no result of {experiment} in {RESULTS.relative_to(ROOT)}")
    result: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8"))
    return result


def machine(result: dict[str, Any]) -> str:
    """What it ran on, in a few words."""
    plan, hardware = result["plan"], result["environment"]["hardware"]
    where = plan["device_name"]
    if plan["device"] == "cpu":
        where = f"{plan['threads']} threads of {hardware['cpu_name']}"
    return f"{where}, PyTorch {result['environment']['versions']['torch']}, {result['date']}"


def demo_output() -> str:
    """What the demo printed, without the rows between evaluations."""
    result = newest("demo")
    lines = [
        line for line in result["output"] if "images/s  data wait" not in line and line.strip()
    ]
    return "\n".join(["```", "$ make demo", *lines, "```", f"({machine(result)})"]) + "\n"


def runs() -> str:
    """The recorded training runs as a table."""
    rows = ["| run | data | top-1 | time, all in | training images/s |", "|---|---|---|---|---|"]
    for experiment in ("demo", "cifar10-short", "imagenet-tiny"):
        result = newest(experiment)
        reached = result["results"]
        rows.append(
            f"| `{result['command']}` | {result['dataset']} | {reached['last_acc1']:.2f}% "
            f"| {result['seconds']:.0f} s | {reached['images_per_second']:.0f} |"
        )
    return "\n".join([*rows, "", f"({machine(newest('cifar10-short'))})"]) + "\n"


BLOCKS: dict[str, Callable[[], str]] = {"demo-output": demo_output, "runs": runs}


def rendered(text: str) -> str:
    """The document with its blocks filled."""
    return BLOCK.sub(lambda match: match[1] + BLOCKS[match[2]]() + match[4], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    stale = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        fresh = rendered(text)
        if fresh != text:
            stale.append(str(document.relative_to(ROOT)))
            if not options.check:
                document.write_text(fresh, encoding="utf-8")
    if stale:
        print(("stale: " if options.check else "rewritten: ") + ", ".join(stale))
    return int(bool(stale) and options.check)


if __name__ == "__main__":
    sys.exit(main())
