"""Programs that need not import torch and transformers again, which takes longer than most of them run."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

GLOBENC = "from globenc.cli import main; main()"  # as `python -m globenc`
# CUDA is asked for without being initialized, which no fork survives
FORKS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
_SERVER = """
import json, multiprocessing, os, sys
import globenc, globenc.extraction.run, globenc.evaluation.run

globenc.GlobEnc.from_pretrained(globenc.ModelSource(device="cpu"))("a film")  # imports the rest
context = multiprocessing.get_context("fork")
answers = os.fdopen(os.dup(1), "w")

def program(code, arguments, folder, *outputs):
    os.chdir(folder)
    for stream, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})

for line in sys.stdin:
    process = context.Process(target=program, args=json.loads(line))
    process.start()
    print(process.pid, file=answers, flush=True)
    process.join()
    print(process.exitcode, file=answers, flush=True)
"""


class Program:
    """A program that runs, with the part of subprocess.Popen that tests use."""

    def __init__(self, server: subprocess.Popen, outputs: list[Path]):
        self._server, self._outputs = server, outputs
        self._pid = int(server.stdout.readline())
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        os.kill(self._pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def poll(self, timeout: float = 0) -> int | None:
        """Its exit code; None while it runs."""
        if self.returncode is None and select.select([self._server.stdout], [], [], timeout)[0]:
            self.returncode = int(self._server.stdout.readline())
        return self.returncode

    def communicate(self, timeout: float) -> list[str]:
        """What it printed on standard output and standard error, when it has ended."""
        if self.poll(timeout) is None:
            raise subprocess.TimeoutExpired("a fork", timeout)
        return [path.read_text() for path in self._outputs]


class Programs:
    """Starts `python -c CODE ARGUMENTS`, one at a time, as forks of a process that has imported everything."""

    def __init__(self, server: subprocess.Popen, folder: Path):
        self._server, self._folder = server, folder
        self._last: Program | None = None

    def start(self, code: str, *arguments: str, folder: str | Path = ".") -> Program:
        if self._last is not None and self._last.poll() is None:  # a test that failed has left it
            self._last.kill()
            self._last.communicate(60)
        outputs = [self._folder / name for name in ("stdout", "stderr")]
        request = [code, arguments, str(Path(folder).resolve()), *map(str, outputs)]
        self._server.stdin.write(f"{json.dumps(request)}\n".encode())
        self._last = Program(self._server, outputs)
        return self._last


@contextlib.contextmanager
def forking_programs(folder: Path) -> Iterator[Programs]:
    """Programs that print into files of a folder; with one thread each: with another number last bits differ."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # as users' are
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        env={**environment, **FORKS},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # nothing is read before it is asked for, so that `select` sees what is there
    ) as server:
        yield Programs(server, folder)
        server.kill()
