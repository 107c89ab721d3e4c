"""Thousands of spoiled checkpoints are loaded: each is refused in one line, and does nothing.

The checkpoints of a short run are cut, changed bit by bit, mixed up with each other and with other
files, and forged with digests that fit. Processes with bounded memory load them. A file that is
damaged must be refused by a UserError of one line; none may run code (a canary file would appear),
end the interpreter or load although a byte was changed. A forgery may load, being a checkpoint of
something else; then a run must resume from it, or refuse it in one line.
"""

import json
import random
import resource
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from checkpoint_mutations import ACCIDENTS, FORGERIES, files_of_other_kinds
from experiment import run_experiment
from lives import begin, end_fault, fork_life, warm_up
from reliability_result import RESULTS, write_result
from tiny_training import newest_version, write_configuration, write_images

from training_framework.checkpoint import load_checkpoint
from training_framework.errors import UserError

FORGED_SHARE = 0.15
BATCH = 40
MEMORY_BYTES = 4 * 2**30
LOADED, REFUSED, WRONG = "loaded", "refused", "wrong"


def spoiled(
    count: int, run: Path, canary: Path, draws: random.Random
) -> Iterator[tuple[str, bytes]]:
    """Kinds and contents: every foreign file once, and `count` mutations."""
    checkpoints = sorted((run / "checkpoints").glob("*.ckpt"))
    contents = list(dict.fromkeys(path.read_bytes() for path in checkpoints))
    assert len(contents) > 1, f"{run} has one checkpoint only"
    others = {name: (run / name).read_bytes()
              for name in ("weights.safetensors", "metrics.csv", "config.yaml")}  # fmt: skip
    yield from files_of_other_kinds(canary, others).items()
    forged = round(FORGED_SHARE * count)
    for number in range(count):
        mutations = FORGERIES if number < forged else ACCIDENTS
        kind = list(mutations)[number % len(mutations)]
        while True:  # until something changed
            content, other = draws.sample(contents, 2)
            changed = mutations[kind](content, other, draws)
            if changed not in contents:
                break
        yield kind, changed


def load_all(paths: Sequence[Path], answers: Path) -> int:
    """In a process of its own: load each file and write down what came of it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    with answers.open("w", encoding="utf-8") as file:
        for path in paths:
            try:
                load_checkpoint(path)
                answer = (LOADED, "")
            except UserError as error:
                answer = (REFUSED, str(error))
            except BaseException as error:
                answer = (WRONG, f"{type(error).__name__}: {error}"[:300])
            file.write(json.dumps(answer) + "\n")
            file.flush()
    return 0


def answers_of(paths: Sequence[Path], folder: Path) -> list[tuple[str, str]]:
    """What came of each file, also where one of them ends the process."""
    answers: list[tuple[str, str]] = []
    while len(answers) < len(paths):
        rest, file = paths[len(answers) :], folder / "answers.jsonl"
        status = fork_life(lambda: load_all(rest, file), folder / "answers.log").end()  # noqa: B023
        answers += [tuple(json.loads(line)) for line in file.read_text().splitlines()]
        if status != 0:
            answers.append((WRONG, f"the process ended with status {status}"))
    return answers


def resumed(config: Path, checkpoint: Path, folder: Path) -> str:
    """What is wrong with how a run resumes from a forgery that loads; empty if nothing is."""
    arguments = ["train", f"--config={config}", "--name=forged", f"--resume={checkpoint}",
                 "--allow-config-change", "--tensorboard=false"]  # fmt: skip
    life = begin(arguments, folder / "resumed.log")
    fault = end_fault(life.end(), life.said())
    if not fault:
        return ""
    tracebacks = [path.read_text() for path in folder.glob("efficient-resnet-*.txt")]
    for path in folder.glob("efficient-resnet-*.txt"):
        path.unlink()
    return "\n".join([fault, *tracebacks])


def mutate_checkpoints(count: int, seed: int) -> dict[str, Any]:
    warm_up()
    draws, started = random.Random(seed), time.monotonic()
    outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    faults = []
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="mutations-"))
        stack.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
        folder = Path(temporary)
        tempfile.tempdir = temporary  # lives leave the tracebacks of what nobody foresaw there
        config, canary = folder / "config.yaml", folder / "canary"
        write_configuration(config, write_images(folder / "images"), num_workers=0,
                            output_dir=str(folder / "runs"), tensorboard=False)  # fmt: skip
        life = begin(["train", f"--config={config}", "--name=run"], folder / "run.log")
        if life.end() != 0:
            raise RuntimeError(life.said())
        run = newest_version(folder / "runs" / "run")
        files = list(spoiled(count, run, canary, draws))
        for start in range(0, len(files), BATCH):
            batch = files[start : start + BATCH]
            paths = [folder / f"{number}.ckpt" for number in range(len(batch))]
            for path, (_, content) in zip(paths, batch, strict=True):
                path.write_bytes(content)
            for path, (kind, _), (outcome, said) in zip(
                paths, batch, answers_of(paths, folder), strict=True
            ):
                outcomes[kind][outcome] += 1
                fault = said if outcome == WRONG else ""
                if outcome == LOADED:
                    fault = "it loads" if kind not in FORGERIES else resumed(config, path, folder)
                if outcome == REFUSED and ("\n" in said or str(path) not in said):
                    fault = f"not one line that names the file: {said}"
                if fault:
                    faults.append(f"{kind}: {fault}")
            if canary.exists():
                faults.append(f"code ran: {sorted({kind for kind, _ in batch})}")
                canary.unlink()
    return {
        "mutations": count,
        "files": len(files),
        "seed": seed,
        "largest_memory_bytes": MEMORY_BYTES,
        "outcomes": {kind: dict(counts) for kind, counts in outcomes.items()},
        "faults": faults,
        "seconds": time.monotonic() - started,
    }


@pytest.mark.long
def test_spoiled_checkpoints_are_refused_and_forged_ones_do_nothing_else(long):
    found = run_experiment(mutate_checkpoints, count=2000 if long else 100, seed=0)
    if long:
        write_result("mutate-checkpoints", RESULTS, found)
    outcomes = found["outcomes"]
    assert not found["faults"]
    assert sum(sum(counts.values()) for counts in outcomes.values()) == found["files"] > 100
    assert outcomes["bits flipped"].keys() == {"refused"}
    assert outcomes["pickle with code"] == {"refused": 1}
