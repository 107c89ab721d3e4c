"""The client of server.py: like `subprocess`, for programs that are forks of a warm process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.distributed import TCPStore

__all__ = ["NARROW_COMMAND", "Forked", "Forks"]

ROOT = Path(__file__).parents[2]
SECONDS_BETWEEN_LOOKS = 0.005
# `efficient-resnet`, with the networks of the fixture narrow_networks.
NARROW_COMMAND = (
    "-c",
    "import sys\n"
    "from training_framework.models import resnet\n"
    "resnet.STAGE_CHANNELS = (4, 8, 16, 32)\n"
    "from training_framework.cli.main import main\n"
    "sys.exit(main())\n",
)


class Forked:
    """A program under way, or ended."""

    def __init__(self, pid: int, folder: Path, arguments: Sequence[str]) -> None:
        self.pid = pid
        self._folder = folder
        self._arguments = arguments

    def poll(self) -> int | None:
        """Its exit status, or the negative number of a signal; None while it runs."""
        status = self._folder / "status"
        return int(status.read_text()) if status.exists() else None

    def wait(self, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
        """Wait for its end; after `timeout` seconds it is killed.

        Raises:
            TimeoutExpired: It did not end in time.
        """
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(list(self._arguments), timeout, *self.said())
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return subprocess.CompletedProcess(list(self._arguments), status, *self.said())

    def said(self) -> tuple[str, str]:
        """What it has written so far to standard output and to standard error."""
        files = (self._folder / name for name in ("stdout", "stderr"))
        output, error = (
            file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
            for file in files
        )
        return output, error

    def send_signal(self, number: int) -> None:
        """As of `subprocess.Popen`."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Forks:
    """The warm process; it is started by the first program."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="forks-"))
        self._count = 0

    def start(
        self,
        *arguments: object,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Forked:
        """Start what `python ARGUMENTS` would start.

        Args:
            *arguments: `-c CODE`, `-m MODULE` or a script, and what follows; `-W` before it.
            cwd: Working directory; the present one if None.
            env: Environment; this process's if None.
        """
        server = self._started()
        assert server.stdin is not None and server.stdout is not None
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        texts = [str(argument) for argument in arguments]
        environment = dict(os.environ if env is None else env)
        # The interpreter of the warm process finds the package by its working directory.
        paths = [environment.get("PYTHONPATH", ""), str(ROOT)]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        request = {
            "arguments": texts,
            "cwd": str(cwd or Path.cwd()),
            "environment": environment,
            "folder": str(folder),
        }
        print(json.dumps(request), file=server.stdin, flush=True)
        return Forked(int(server.stdout.readline()), folder, texts)

    def run(
        self,
        *arguments: object,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> "subprocess.CompletedProcess[str]":
        """As `start`, and wait for its end."""
        return self.start(*arguments, cwd=cwd, env=env).wait(timeout)

    def run_ranks(
        self, count: int, *arguments: object, cwd: str | Path | None = None, timeout: float = 120
    ) -> "subprocess.CompletedProcess[str]":
        """Run processes that train together, as `torchrun --nproc-per-node COUNT` does.

        Once one of them fails, the others are ended by SIGTERM. The result joins what they say.
        """
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
            "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1",
            "TORCHELASTIC_RUN_ID": "forks", "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        ranks = [
            self.start(*arguments, cwd=cwd, env={**shared, "RANK": str(n), "LOCAL_RANK": str(n)})
            for n in range(count)
        ]
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks):
                for rank in ranks:
                    rank.send_signal(signal.SIGTERM)
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
        done = [rank.wait(timeout) for rank in ranks]
        status = next((one.returncode for one in done if one.returncode), 0)
        output, error = "".join(one.stdout for one in done), "".join(one.stderr for one in done)
        return subprocess.CompletedProcess([str(text) for text in arguments], status, output, error)

    def close(self) -> None:
        """End the warm process."""
        if self._server is not None:
            self._server.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _started(self) -> "subprocess.Popen[str]":
        if self._server is None:
            threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._server = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("server.py"))],
                env={**os.environ, **threads}, cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert self._server.stdout is not None
            assert self._server.stdout.readline() == "ready\n"
        return self._server
