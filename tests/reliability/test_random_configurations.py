"""Random configurations, drawn from the schema: what is valid trains and resumes, the rest is told.

A valid one trains a few steps straight, then again with a stop at a random step and a resumption,
and both must end equal bit for bit. One that the program refuses all the same must be refused in
one line both times. An invalid one must end with status 2 and exactly one line that says a cure,
and change no file. Configurations that once went wrong are kept in `FOUND`.
"""

import random
import shutil
import string
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from experiment import run_experiment
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from lives import begin, end_fault, warm_up
from reliability_result import RESULTS, write_result
from test_double_launches import digest_of_files
from tiny_training import newest_version, write_images

from training_framework.config import TrainConfig
from training_framework.config.inheritance import Setting, parse_yaml
from training_framework.config.loading import build_config, config_to_dict
from training_framework.errors import UserError
from training_framework.measure.verify.difference import compare_runs

TERMINATED = 143
# What a run of a second can be: sizes are bounded, and nothing waits for a compiler or a GPU.
SMALL: dict[str, st.SearchStrategy[Any]] = {
    "data": st.sampled_from(["synthetic", "synthetic", "folder"]),
    "img_size": st.sampled_from([8, 8, 9, 12, 16]),
    "num_classes": st.none(),
    "limit_train_images": st.none() | st.integers(2, 6),
    "synthetic_train_images": st.integers(6, 40),
    "synthetic_val_images": st.integers(1, 12),
    "crop_padding": st.integers(0, 6) | st.just("auto"),
    "cutout": st.integers(0, 20),
    "model": st.sampled_from(["resnet10", "resnet10", "resnet10", "resnet18", "resnet50"]),
    "weights": st.none(),
    "eval_img_size": st.none() | st.integers(8, 16),
    "progressive_resolution": st.just([])
    | st.tuples(st.floats(0.1, 0.9), st.integers(8, 14)).map(lambda later: [[0.0, 8], list(later)]),
    "rand_augment_operations": st.integers(1, 3),
    "average_from": st.sampled_from([0.0, 0.0, 0.0, 0.5]),
    "final_lr_fraction": st.sampled_from([0.0, 0.0, 0.0, 0.1]),
    "recompute_norm_batches": st.integers(0, 3),
    "epochs": st.integers(1, 3) | st.floats(0.3, 3),
    "batch_size": st.integers(2, 12),
    "accumulate_grad_batches": st.integers(1, 4),
    "lr": st.floats(1e-6, 0.2) | st.just("auto"),
    "eps": st.floats(1e-10, 1e-2),
    "mixup": st.sampled_from([0.0, 0.0, 0.2, 1.0, 30.0]),
    "cutmix": st.sampled_from([0.0, 0.0, 0.2, 1.0, 30.0]),
    "weight_decay": st.floats(0, 0.1),
    "milestones": st.lists(st.floats(0.1, 3), max_size=3, unique=True).map(sorted),
    "step_size": st.floats(0.01, 4),
    "warmup_epochs": st.none() | st.floats(0, 3),
    "warmup_steps": st.none() | st.integers(0, 3),
    "grad_clip_val": st.none() | st.floats(1e-3, 10),
    "accelerator": st.sampled_from(["auto", "cpu"]),
    "devices": st.sampled_from([1, "auto"]),
    "precision": st.sampled_from(["auto", "32", "32", "bf16-mixed", "mixed", 32]),
    "compile": st.sampled_from(["auto", False]),
    "compile_mode": st.none(),
    # Kernels compiled here start threads' pools of their own; they have their own tests.
    "threads": st.just(1),
    "num_workers": st.sampled_from([0, 0, 0, 1, 2, "auto"]),
    "prefetch_factor": st.integers(1, 5),
    "name": st.none() | st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z"),
    "log_every_n_steps": st.integers(1, 9),
    "val_check_interval": st.integers(1, 9) | st.floats(0.05, 3),
    "save_every_n_steps": st.none() | st.integers(1, 9),
    "save_every_seconds": st.none() | st.floats(0.001, 600),
    "save_top_k": st.integers(0, 4),
}
# Set by the test itself, or of no use without what it does not have.
LEFT_OUT = {"data_root", "output_dir", "resume", "stop_after_steps", "allow_config_change"}
CONTRADICTIONS: list[dict[str, Any]] = [
    {"warmup_epochs": 0.5, "warmup_steps": 3},
    {"warmup_epochs": 40.0},
    {"scheduler": "multi_step"},
    {"milestones": [1.0], "scheduler": "cosine"},
    {"milestones": [2.0, 1.0], "scheduler": "multi_step"},
    {"nesterov": True, "optimizer": "adam"},
    {"nesterov": True, "momentum": 0.0},
    {"share_early_weights": True, "model": "resnet50"},
    {"compile": False, "compile_mode": "default"},
    {"cuda_graph": True, "compile_mode": "max-autotune"},
    {"resume": "nowhere.ckpt"},
    {"resume": "nowhere.ckpt", "weights": "nowhere.safetensors"},
    {"data": "digits", "data_root": "images"},
    {"data_root": "nowhere"},
    {"data": "packed"},
    {"weights": "nowhere.safetensors"},
    {"accelerator": "gpu"},
    {"devices": 2},
    {"data": "digits", "num_classes": 5},
    {"save_every_n_steps": 0},
    {"progressive_resolution": [[0.5, 8]]},
    {"average_from": 0.5, "ema_decay": 0.9},
    {"final_lr_fraction": 0.1, "scheduler": "one_cycle"},
]  # fmt: skip
WRONG_VALUES: list[Any] = [
    None, True, False, -1, 0, 0.5, -0.5, 1e309, float("nan"), 10**30, "", "auto", "no", "x" * 300,
    "1e3", "\x00", "\x1b[2J", "ü", [], [1], [[1.0]], ["a"], {}, {"a": 1}, "2026-11-26", "../..",
]  # fmt: skip
FOUND: list[dict[str, Any]] = [
    # The seed of the synthetic images overflowed.
    {"data": "synthetic", "img_size": 8, "model": "resnet10", "epochs": 1, "batch_size": 6,
     "threads": 1, "synthetic_train_images": 12, "synthetic_val_images": 2, "seed": 2**63 - 1},
]  # fmt: skip


def setting(key: str) -> st.SearchStrategy[Any]:
    """Values of a key, from the schema unless they have to be small."""
    if key in SMALL:
        return SMALL[key]
    schema = TrainConfig.model_json_schema()["properties"][key]
    return st.one_of(*(_of_schema(member) for member in schema.get("anyOf", [schema])))


def _of_schema(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    kind = schema["type"]
    if kind == "boolean":
        return st.booleans()
    if kind == "null":
        return st.none()
    low, high = schema.get("minimum", 0), schema.get("maximum", schema.get("exclusiveMaximum", 1))
    if kind == "integer":
        return st.integers(low, high - ("exclusiveMaximum" in schema))
    assert kind == "number", schema
    excluded = "exclusiveMaximum" in schema
    return st.floats(low, high, exclude_max=excluded, exclude_min="exclusiveMinimum" in schema)


def configurations() -> st.SearchStrategy[dict[str, Any]]:
    """Settings that the schema takes, of few or of many keys."""
    keys = [key for key in TrainConfig.model_fields if key not in LEFT_OUT]
    always = ("data", "img_size", "model", "epochs", "batch_size", "threads", "compile",
              "synthetic_train_images", "synthetic_val_images")  # fmt: skip
    return st.fixed_dictionaries(
        {key: setting(key) for key in always},
        optional={key: setting(key) for key in keys if key not in always},
    ).filter(_is_valid)


def _is_valid(values: dict[str, Any]) -> bool:
    try:
        build_config({key: Setting(value, "drawn") for key, value in values.items()})
    except UserError:
        return False
    return True


def drawn(count: int, start: int) -> list[dict[str, Any]]:
    """So many different ones, always the same for a start."""
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:

        @seed(start)
        @settings(max_examples=count, phases=[Phase.generate], database=None, deadline=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(configurations())
        def take(values: dict[str, Any]) -> None:
            found.setdefault(repr(sorted(values.items())), values)

        take()
        start += 1
    return list(found.values())[:count]


def spoiled(values: dict[str, Any], draws: random.Random) -> dict[str, Any]:
    """The same with one thing that cannot be."""
    deed = draws.random()
    if deed < 0.25:
        return {**values, **draws.choice(CONTRADICTIONS)}
    if deed < 0.4:
        key = draws.choice(list(TrainConfig.model_fields))
        place = draws.randrange(len(key))
        typo = key[:place] + draws.choice(string.ascii_lowercase) * 2 + key[place + 1 :]
        return {**values, typo: 1}
    while True:
        changed = {
            **values,
            draws.choice(list(TrainConfig.model_fields)): draws.choice(WRONG_VALUES),
        }
        # As the program reads it: the text 1e3, for one, is a number there.
        if not _is_valid(parse_yaml(yaml.safe_dump(changed))):
            return changed


class Tries:
    """Configurations tried in a folder, and what came of them."""

    def __init__(self, folder: Path, start: int) -> None:
        self._folder = folder
        folder.mkdir()
        self._images = write_images(folder / "images")
        self._draws = random.Random(start)
        self.outcomes: Counter[str] = Counter()
        self.refusals: dict[str, str] = {}
        self.faults: list[dict[str, Any]] = []

    def valid(self, values: dict[str, Any]) -> None:
        """Train straight, and with a stop; compare."""
        runs = self._folder / "runs"
        shutil.rmtree(runs, ignore_errors=True)
        values = {**values, "output_dir": str(runs / "straight")}
        if values["data"] == "folder":
            values["data_root"] = str(self._images)
        straight = self._train(values)
        fault, outcome = self._fault_of(straight), "trained"
        if not fault and straight[0] == 2:
            outcome = "refused in one line"
            self.refusals[straight[1].splitlines()[-1]] = repr(values)
        elif not fault:
            run = newest_version(next((runs / "straight").iterdir()))
            fault = self._stopped_differs(values, run)
        self._keep(values, fault, outcome)

    def _stopped_differs(self, values: dict[str, Any], straight: Path) -> str:
        steps = int((straight / "metrics.csv").read_text().splitlines()[-1].split(",")[0])
        if steps < 2:
            return ""
        stopped = {**values, "output_dir": str(self._folder / "runs" / "stopped")}
        place = self._draws.randrange(1, steps)
        for fault, expected in ((f"step.after_update:{place}:term", TERMINATED), ("", 0)):
            status, said = self._train(stopped, fault=fault)
            if status != expected:
                return f"stopped after {place}: status {status}: {said}"
        runs = next((self._folder / "runs" / "stopped").iterdir())
        if len(list(runs.iterdir())) != 1:
            return f"stopped after {place}: it started anew"
        differences = compare_runs(straight, newest_version(runs)).differences
        return f"stopped after {place}: {'; '.join(differences)}" if differences else ""

    def invalid(self, values: dict[str, Any]) -> None:
        """Have it refused."""
        runs = self._folder / "kept"
        if not runs.exists():
            plain = {"data": "synthetic", "img_size": 8, "model": "resnet10", "epochs": 1,
                     "threads": 1, "batch_size": 4, "synthetic_train_images": 8,
                     "synthetic_val_images": 4, "output_dir": str(runs),
                     "name": "kept"}  # fmt: skip
            status, said = self._train(plain)
            assert status == 0, said
        before = digest_of_files(runs)
        values = {"name": "kept", "output_dir": str(runs), **values}
        if values.get("data") == "folder" and "data_root" not in values:
            values["data_root"] = str(self._images)
        end = self._train(values)
        fault = self._fault_of(end)
        if not fault and end[0] != 2:
            fault = f"status {end[0]}: it trains"
        if not fault and len(end[1].splitlines()) != 1:
            fault = f"more than one line: {end[1]}"
        if not fault and digest_of_files(runs) != before:
            fault = "files were changed"
        self._keep(values, fault, "refused in one line")

    def _train(self, values: dict[str, Any], *, fault: str = "") -> tuple[int, str]:
        config = self._folder / "config.yaml"
        config.write_text(yaml.safe_dump(values, allow_unicode=False), encoding="utf-8")
        life = begin(["train", f"--config={config}"], self._folder / "said", fault=fault)
        return life.end(), life.said()

    def _fault_of(self, end: tuple[int, str]) -> str:
        status, said = end
        return said if "fault of the program" in said else end_fault(status, said)

    def _keep(self, values: dict[str, Any], fault: str, outcome: str) -> None:
        self.outcomes["faults" if fault else outcome] += 1
        if fault:
            self.faults.append({"fault": fault, "settings": repr(values)})


def _show(done: int, count: int, kind: str, tries: Tries) -> None:
    if done % 50 == 0:
        print(f"{done:,} of {count:,} {kind} configurations: {dict(tries.outcomes)}", flush=True)


def random_configurations(valid: int, invalid: int, start: int) -> dict[str, Any]:
    warm_up()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="configurations-") as temporary:
        trained, refused = (Tries(Path(temporary) / name, start) for name in ("valid", "invalid"))
        for number, values in enumerate([*FOUND, *drawn(valid, start)]):
            trained.valid(values)
            _show(number + 1, valid + len(FOUND), "valid", trained)
        draws = random.Random(start)
        for number, values in enumerate(drawn(invalid, start + 10**6)):
            refused.invalid(spoiled(values, draws))
            _show(number + 1, invalid, "invalid", refused)
    return {
        "valid": valid,
        "invalid": invalid,
        "found_before": len(FOUND),
        "start": start,
        "outcomes_of_valid": dict(trained.outcomes),
        "refusals_of_valid": trained.refusals,
        "outcomes_of_invalid": dict(refused.outcomes),
        "faults": [*trained.faults, *refused.faults],
        "seconds": time.monotonic() - started,
    }


@pytest.mark.long
@pytest.mark.timeout(280)
def test_random_configurations_train_and_resume_exactly_or_are_refused_in_one_line(long):
    valid, invalid = (1000, 1000) if long else (6, 40)
    found = run_experiment(random_configurations, valid=valid, invalid=invalid, start=0)
    if long:
        write_result("random-configurations", RESULTS, found)
    assert not found["faults"]
    assert found["outcomes_of_valid"]["trained"] > 0.8 * valid
    assert found["outcomes_of_invalid"] == {"refused in one line": invalid}


def test_every_setting_is_drawn():
    keys = {key for values in drawn(300, 0) for key in values}
    assert keys == TrainConfig.model_fields.keys() - LEFT_OUT
    assert config_to_dict(TrainConfig()).keys() == TrainConfig.model_fields.keys()
