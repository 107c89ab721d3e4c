"""The suite for a lent GPU: its commands, its limits, and a machine that has almost nothing."""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from training_framework.config import load_config
from training_framework.config.flags import add_config_flags, given_settings
from training_framework.measure.compare.experiment import load_experiment

sys.path.insert(0, str(Path(__file__).parent))
from bare import make_bare_python, make_wheel, run_bare

ROOT = Path(__file__).parents[2]
bare_machine, collect, gpu_page, gpu_parts, gpu_suite, step_speed = map(
    importlib.import_module,
    ("bare_machine", "collect_wheels", "gpu_page", "gpu_parts", "gpu_suite", "step_speed"),
)
ALL = [
    gpu_parts.Options(),
    gpu_parts.Options(cifar10="data", recipe="cifar10-short", lightning=True),
    gpu_parts.Options(accelerator="cpu", small=True, recipe="cifar10-short"),
    gpu_parts.Options(accelerator="cpu", small=True),
]


def tasks_of(options):
    return [task for part in gpu_parts.parts(options) for task in part.tasks]


def parsed(flags):
    """Flags as the command line reads them: settings, and the flags of `compare` itself."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, kind in (("rounds", int), ("seconds", float), ("patience", float),
                       ("dropped-steps", int), ("output", str)):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind)
    add_config_flags(parser)
    options = parser.parse_args(flags)
    return options, given_settings(options)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_every_command_of_every_part_is_one_that_exists(options):
    for task in tasks_of(options):
        first, *rest = task.command
        if first != "-m":
            script = Path(first)
            assert script.is_file(), task
            if script.stem == "step_speed":
                assert rest[0] in step_speed.ROWS
            if script.stem == "record_run":
                flags, settings = parsed(rest[rest.index("--") + 1 :])
                load_config(flags.config, settings)
        elif rest[0] == "training_framework" and rest[1] == "compare":
            flags, settings = parsed(rest[3:])
            assert flags.output == task.result
            changes = {"rounds": flags.rounds} if flags.rounds else {}
            experiment = load_experiment(rest[2], settings, **changes)
            if options.accelerator == "cpu":
                assert experiment.base["accelerator"] == "cpu"
        else:
            assert rest[:2] in (
                ["training_framework", "plan"], ["training_framework", "profile"]
            ) or rest[0] == "pytest"  # fmt: skip


def test_parts_have_names_of_their_own_and_a_purpose_in_words():
    for options in ALL:
        tasks = tasks_of(options)
        assert len({task.name for task in tasks}) == len(tasks)
        assert all(task.proves and 0 < task.minutes <= 8 for task in tasks)
        results = [task.result for task in tasks if task.result]
        assert len(set(results)) == len(results)
    names = " ".join(task.name for task in tasks_of(gpu_parts.Options()))
    for batch in (128, 256, 512, 1024, 2048):
        assert f"step-speed-gpu-32px-{batch}" in names
    for promised in (
        "cuda-tests", "host-waits", "gpu-resnet50", "gpu-ladder", "gpu-batch-sweep",
        "gpu-ablation", "cifar10-94", "gpu-resume",
    ):  # fmt: skip
        assert promised in names


def test_the_tests_that_need_cuda_are_those_with_the_mark():
    marked = {Path(file) for file in gpu_parts._cuda_test_files()} - {Path(__file__)}
    needing = {
        file
        for file in (ROOT / "tests").rglob("test_*.py")
        if "cuda.is_available()" in file.read_text()
    } - {Path(__file__)}
    assert needing <= marked
    for file in marked:  # the machine has no hypothesis
        assert "hypothesis" not in file.read_text(), file


def script_task(tmp_path, name, code, **fields):
    file = tmp_path / f"{name}.py"
    file.write_text(code)
    return gpu_parts.Task(name=name, proves="", command=(str(file),), **fields)


@pytest.fixture
def suite(tmp_path, monkeypatch):
    def make():
        made = gpu_suite.Suite(tmp_path / "out", tmp_path / "no wheels")
        monkeypatch.setattr(made, "_write_page", lambda: True)
        return made

    return make


def ledger(tmp_path):
    return json.loads((tmp_path / "out" / "ledger.json").read_text())["tasks"]


def test_a_failure_and_an_overrun_stop_nothing_and_what_is_done_is_not_done_again(
    suite, tmp_path, monkeypatch
):
    monkeypatch.setattr(gpu_suite, "SECONDS_FOR_THE_PAGE", 0.0)
    count = "open('count', 'a').write('x')"
    slow = "import pathlib, time\npathlib.Path('kept.json').write_text('{}')\ntime.sleep(60)\n"
    part = gpu_parts.Part(
        title="", tasks=(
            script_task(tmp_path, "fails", "import sys; print('why'); sys.exit(3)"),
            script_task(tmp_path, "hangs", slow, minutes=0.02),
            script_task(tmp_path, "good", count),
            script_task(tmp_path, "elsewhere", count, missing="no data: give --cifar10 DIR"),
        ),
    )  # fmt: skip
    assert suite().run(1, part, 5.0) is False
    found = ledger(tmp_path)
    assert {name: entry["status"] for name, entry in found.items()} == {
        "fails": "failed", "hangs": "cut off", "good": "done", "elsewhere": "not available",
    }  # fmt: skip
    assert found["fails"]["exit"] == 3
    assert "why" in (tmp_path / "out/logs/fails.log").read_text()
    assert (tmp_path / "out/kept.json").read_text() == "{}"
    assert suite().run(1, part, 5.0) is False
    assert (tmp_path / "out/count").read_text() == "x"


def test_an_unfinished_result_is_resumed_and_one_of_other_settings_is_set_aside(suite, tmp_path):
    resume = tmp_path / "resume.py"
    resume.write_text("import pathlib; pathlib.Path('r.json').write_text('resumed')")
    stops = "import pathlib, sys; pathlib.Path('r.json').write_text('begun'); sys.exit(1)"
    task = script_task(tmp_path, "half", stops, result="r.json", resume=(str(resume),))
    part = gpu_parts.Part(title="", tasks=(task,))
    assert suite().run(1, part, 5.0) is False
    left = json.loads((tmp_path / "out/ledger.json").read_text())
    left["tasks"]["half"]["status"] = "running"  # as if the machine was taken away
    (tmp_path / "out/ledger.json").write_text(json.dumps(left))
    assert suite().run(1, part, 5.0) is True
    assert (tmp_path / "out/r.json").read_text() == "resumed"
    other = gpu_parts.Task(**{**vars(task), "command": (*task.command, "--other")})
    assert suite().run(1, gpu_parts.Part(title="", tasks=(other,)), 5.0) is False
    assert (tmp_path / "out/r.json").read_text() == "begun"
    assert (tmp_path / "out/r.old-1").read_text() == "resumed"


def test_a_part_that_has_no_time_left_says_so(suite, tmp_path):
    part = gpu_parts.Part(title="", tasks=(script_task(tmp_path, "late", "pass"),))
    assert suite().run(1, part, 0.0) is False
    assert ledger(tmp_path)["late"]["status"] == "no time left"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--output", "file"), "file/logs"),
        (("--output", "out", "--only", "gpu-32px"), "no task gpu-32px"),
        (("--output", "out", "--cifar10", "nowhere"), "nowhere has no folder cifar-10-batches-py"),
        (("--output", "out", "--wheels", "."), "is damaged"),
    ],
)
def test_what_cannot_work_is_one_line_at_once(flags, said, in_tmp_path, capsys):
    Path("file").write_text("")
    Path("tqdm-4.0-py3-none-any.whl").write_bytes(b"half a whe")
    with contextlib.suppress(SystemExit):
        assert gpu_suite.main([*flags, "--part", "1"]) == 2
    *usage, error = capsys.readouterr().err.splitlines()
    assert said in error
    assert not any("Traceback" in line for line in usage)


@pytest.mark.parametrize("text", ['{"tasks": {"pl', "[]", "{}"])
def test_a_ledger_that_cannot_be_read_is_set_aside(text, suite, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ledger.json").write_text(text)
    part = gpu_parts.Part(title="", tasks=(script_task(tmp_path, "works", "pass"),))
    assert suite().run(1, part, 1.0)
    assert ledger(tmp_path)["works"]["status"] == "done"
    assert (tmp_path / "out" / "ledger.old-1").read_text() == text
    assert "ledger.old-1" in capsys.readouterr().out


def test_packages_in_the_users_home_are_found_from_another_home(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONUSERBASE", raising=False)
    program = "import site; print(site.getuserbase())"
    (base,) = {
        subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
        for environment in (
            dict(os.environ),
            bare_machine.environment_for(tmp_path, tmp_path, tmp_path / "scratch"),
        )
    }
    assert base.strip()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tqdm-4.0-py3-none-any", True),
        ("six-1.0-py2.py3-none-any", True),
        ("psutil-7.0-cp36-abi3-manylinux2014_x86_64.manylinux_2_17_x86_64", True),
        (f"pydantic_core-2.0-cp3{sys.version_info.minor}-cp3{sys.version_info.minor}-"
         "manylinux_2_17_x86_64", True),
        ("pydantic_core-2.0-cp39-cp39-manylinux_2_17_x86_64", False),
        ("psutil-7.0-cp36-abi3-manylinux2014_aarch64", False),
        ("psutil-7.0-cp399-abi3-manylinux2014_x86_64", False),
        ("not a wheel", False),
    ],
)  # fmt: skip
def test_only_wheels_for_this_machine_are_unpacked(name, expected, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert bare_machine.fits(Path(f"{name}.whl")) == expected


def test_the_wheels_are_all_that_the_package_and_its_tests_need():
    brought = {*collect.BROUGHT, *collect.FOR_PLOTS, *collect.PRESENT}
    known = {canonical(name) for name in (*brought, *collect.NOT_NEEDED)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {canonical(text) for text in project["dependencies"]} <= known
    for name in (*collect.BROUGHT, *collect.FOR_PLOTS):
        for text in importlib.metadata.requires(name) or ():
            if "extra ==" not in text and "win" not in text.lower() and "python_v" not in text:
                assert canonical(text) in known, (name, text)


def canonical(requirement):
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name[0]).lower()


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare")
    wheels = folder / "wheels"
    wheels.mkdir()
    for name in (*collect.BROUGHT, *collect.FOR_PLOTS):
        make_wheel(name, wheels)
    return make_bare_python(folder / "python"), wheels


def test_a_machine_with_pytorch_alone_trains_and_writes_the_page(bare_python, tmp_path):
    python, wheels = bare_python
    refused = run_bare(
        python, "-c", "import importlib.util as u, socket\n"
        "assert u.find_spec('torch') and not u.find_spec('pydantic')\n"
        "socket.create_connection(('127.0.0.1', 9))", cwd=tmp_path,
    )  # fmt: skip
    assert "there is no network here" in refused.stderr
    done = run_bare(
        python, str(ROOT / "benchmarks/gpu_suite.py"), "--output", "results", "--part", "1",
        "--only", "gpu-first-run", "--accelerator", "cpu", "--small", "--wheels", str(wheels),
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "gpu-first-run.json", "index.html", "ledger.json", "logs", "scratch",
    }  # fmt: skip
    page = (tmp_path / "results/index.html").read_text()
    assert "1 tasks: 1 done" in page and "<svg" in page and "gpu-first-run" in page
    assert "nothing here is about a GPU" in page and "confirmed" not in page


def test_without_the_wheels_it_says_what_to_bring(bare_python, tmp_path):
    python, _ = bare_python
    done = run_bare(
        python, str(ROOT / "benchmarks/gpu_suite.py"), "--output", "results", "--part", "1",
        "--wheels", "none", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "this Python has no PIL, psutil, pydantic" in done.stderr
    assert "collect_wheels.py" in done.stderr


@pytest.mark.long
def test_every_part_runs_to_its_end_on_a_machine_with_pytorch_alone(bare_python, tmp_path, long):
    if not long:
        pytest.skip("takes minutes: --long")
    python, wheels = bare_python
    done = run_bare(
        python, str(ROOT / "benchmarks/gpu_suite.py"), "--output", "results",
        "--accelerator", "cpu", "--small", "--minutes", "30", "--wheels", str(wheels),
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results/ledger.json").read_text())["tasks"]
    assert {entry["status"] for entry in found.values()} == {"done", "not available"}
    assert {name for name, entry in found.items() if entry["status"] != "done"} == {
        "step-speed-lightning", "step-speed-lightning-tiny",
    }  # fmt: skip
    assert "gpu-ladder" in (tmp_path / "results/index.html").read_text()


def test_the_list_names_every_part(capsys):
    assert gpu_suite.main(["--list"]) == 0
    out = capsys.readouterr().out
    for part in gpu_parts.parts(gpu_parts.Options()):
        assert part.title in out
