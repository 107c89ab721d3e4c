"""Runs Python programs as forks of one process that has imported what they import first.

A fresh interpreter that imports torch takes two seconds of a core, a fork tenths of one. The
package itself is imported by each program: from its own PYTHONPATH and with its own environment.
A request is a line of JSON from standard input; the answer is a line with the process id.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = (
    "torch", "torch.distributed", "torch.nn.parallel", "torch.utils.data",
    "torch.utils.flop_counter", "torch.utils.tensorboard", "torch._dynamo.eval_frame",
    "multiprocessing.pool", "multiprocessing.queues", "multiprocessing.synchronize", "numpy",
    "PIL.Image", "psutil", "pydantic", "safetensors.torch", "simplejpeg", "sklearn.datasets",
    "tqdm", "yaml",
)  # fmt: skip


def main() -> None:
    """Start programs until there are no more requests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in LIBRARIES:
            importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork could wait for a thread's lock"  # noqa: PTH208
    print("ready", flush=True)
    for line in sys.stdin:
        print(_start(json.loads(line)), flush=True)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    with contextlib.suppress(ChildProcessError):
        while os.wait():
            pass


def _start(request: dict[str, Any]) -> int:
    """Start a program below a process that writes down how it ends. Returns the program's id."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            os.close(reading)
            program = os.fork()
            if program == 0:
                os.close(writing)
                _live(request)
            os.write(writing, str(program).encode())
            os.close(writing)
            status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
            unfinished = Path(request["folder"], "status.part")
            unfinished.write_text(str(status))
            unfinished.rename(unfinished.with_name("status"))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        return int(answer.read())


def _live(request: dict[str, Any]) -> NoReturn:
    status = 1
    try:
        os.setsid()
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(Path(request["folder"], name), os.O_WRONLY | os.O_CREAT)
            os.dup2(file, descriptor)
            os.close(file)
        os.close(nothing)
        status = _run(request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _run(arguments: list[str]) -> int:
    """What `python ARGUMENTS` does. Returns its exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    path = os.environ.get("PYTHONPATH", "")
    sys.path[:0] = [folder for folder in path.split(os.pathsep) if folder]
    while arguments[0] == "-W":
        warnings.simplefilter(arguments[1])  # type: ignore[arg-type]
        arguments = arguments[2:]
    kind, *rest = arguments
    try:
        if kind == "-c":
            code, sys.argv = rest[0], ["-c", *rest[1:]]
            sys.path.insert(0, "")
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            sys.argv = rest
            sys.path.insert(0, str(Path.cwd()))
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(kind).resolve().parent))
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # Python ends by the signal itself, too
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return 0


if __name__ == "__main__":
    main()
