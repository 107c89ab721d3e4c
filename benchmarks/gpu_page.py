"""Write the page of all results of gpu_suite.py: DIR/index.html.

python benchmarks/gpu_page.py DIR
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from claims import CLAIMS, OPEN

from training_framework.errors import UserError
from training_framework.measure.report.render import html_page
from training_framework.measure.report.sections import Section, section_of
from training_framework.measure.report.sources import Source, read_source
from training_framework.runs.directory import write_text_atomically

__all__ = ["page_of"]

TITLE = "What ran on the GPU"


def main() -> int:
    folder = Path(sys.argv[1])
    write_text_atomically(folder / "index.html", page_of(folder))
    print(f"page: {folder / 'index.html'}")
    return 0


def page_of(folder: Path) -> str:
    """The page of a folder that gpu_suite.py writes to."""
    ledger = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
    sources, unreadable = _sources(folder)
    sections = [
        _ledger_section(ledger, unreadable),
        *_cuda_tests(folder),
        *_host_waits(folder),
        _claims_section(folder),
        *map(section_of, sources),
    ]
    return html_page(TITLE, sections)


def _sources(folder: Path) -> tuple[list[Source], list[str]]:
    """The results that a report can show, and why others cannot be shown."""
    sources, unreadable = [], []
    own = ("ledger.json", "host-waits.json")
    files = [*sorted(folder.glob("*.json")), *sorted(folder.glob("profile/*/profile.json"))]
    for file in files:
        if file.name in own or file.name.startswith("step-overhead"):
            continue
        try:
            sources.append(read_source(file))
        except UserError as error:
            unreadable.append(str(error))
    return sources, unreadable


def _ledger_section(ledger: Mapping[str, Any], unreadable: Sequence[str]) -> Section:
    tasks = ledger["tasks"]
    states = [entry["status"] for entry in tasks.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    small = "Tiny sizes, to try the suite: no figure here says anything about speed. "
    on_cpu = "Made on a CPU: nothing here is about a GPU. "
    return Section(
        heading="Ledger",
        answer=f"{len(tasks)} tasks: {counts}.",
        lead=[
            (small if ledger.get("small") else "")
            + (on_cpu if ledger.get("accelerator") == "cpu" else "")
        ],
        titles=("task", "part", "status", "seconds", "what it proves, once it is done"),
        rows=[
            [name, str(entry["part"]), entry["status"], f"{entry['seconds']:.0f}", entry["proves"]]
            for name, entry in tasks.items()
        ],
        notes=[
            *(f"{name}: {entry['reason']}" for name, entry in tasks.items() if "reason" in entry),
            *unreadable,
        ],
        command="python benchmarks/gpu_suite.py --output DIR",
        environment=[("commit", ledger.get("commit") or "not given")],
    )


def _cuda_tests(folder: Path) -> list[Section]:
    file = folder / "cuda-tests.xml"
    if not file.exists():
        return []
    suites = list(ElementTree.parse(file).getroot().iter("testsuite"))
    counts = {
        key: sum(int(suite.get(key, 0)) for suite in suites)
        for key in ("tests", "failures", "errors", "skipped")
    }
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    cases = [case for suite in suites for case in suite.iter("testcase")]
    bad = [case for case in cases if any(child.tag in ("failure", "error") for child in case)]
    return [
        Section(
            heading="Tests that need CUDA",
            answer=f"{passed} passed, {counts['failures'] + counts['errors']} failed, "
            f"{counts['skipped']} skipped.",
            rows=[[key, str(count)] for key, count in counts.items()],
            notes=[f"{case.get('classname')}: {case.get('name')}" for case in bad],
            command="python -m pytest -m cuda",
        )
    ]


def _host_waits(folder: Path) -> list[Section]:
    file = folder / "host-waits.json"
    if not file.exists():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for name, row in found["rows"].items():
        reason = row.get("unavailable") or row.get("failed")
        if reason:
            rows.append([name, reason])
            continue
        waits = ", ".join(f"{call} {count:g}" for call, count in row["waits"].items())
        rows.append([name, row["device"], waits or "none", f"{sum(row['launches'].values()):g}"])
    return [
        Section(
            heading="Host waits in a step",
            answer="How often the host waits for the GPU, and how often it launches something.",
            titles=("step", "device", "waits per step", "launches per step"),
            rows=rows,
            command="python benchmarks/host_waits.py --output FILE",
            environment=[("device", found["device"]), ("torch", found["versions"]["torch"])],
        )
    ]


def _claims_section(folder: Path) -> Section:
    """The claims that these results decide; the others need results from elsewhere."""

    def newest(experiment: str) -> dict[str, Any] | None:
        file = folder / f"{experiment}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    rows = []
    for claim in CLAIMS:
        finding = claim.find(newest)
        if finding is not None and claim.on_gpu:
            rows.append([claim.what, claim.theirs, finding.measured, finding.verdict])
        elif claim.on_gpu:
            rows.append([claim.what, claim.theirs, "not yet measured", OPEN])
    return Section(
        heading="Claims of earlier projects",
        answer="Claims that only a GPU can decide.",
        titles=("claim", "theirs", "measured", "verdict"),
        rows=rows,
        command="python benchmarks/gpu_suite.py --output DIR --part 2 5",
    )


if __name__ == "__main__":
    sys.exit(main())
