"""The client of a worker process: JSON lines in, JSON lines out, one request at a time.

The protocol is described in ``export/common/worker_protocol.py``, which answers it. A worker ends with the end of its
input and, should it hang, by the guard of its process group, even when this process is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil

from sparsedeploy.errors import UserError
from sparsedeploy.resources import cache_folder
from sparsedeploy.runtimes.process_group import GuardedProcess

_LOGS_KEPT = 20
_TELLING = re.compile(r"Assertion|\w*Error\b|terminate called|what\(\):|Segmentation fault|[Oo]ut of memory")


class Worker:
    """A running worker process; use it as a context manager.

    Args:
        command: the interpreter of the runtime's environment and its worker script.
        name: of the runtime, for messages and the log's name.
        environment: all environment variables of the process; None for this process's own.
        timeout: seconds that one request may take, the start included.

    Attributes:
        ready: what the worker said when it started.
        folder: a temporary folder for arrays, removed at the end.
        log: the file that holds its standard error.

    Raises:
        UserError: it does not start. Every later failure of the process is a UserError too.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str,
        environment: Mapping[str, str] | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.name = name
        self.timeout = timeout
        self.log = new_log(name)
        self.folder = Path(tempfile.mkdtemp(prefix=f"sparsedeploy-{name}-"))
        self._number = 0
        self._lines: queue.Queue[str | None] = queue.Queue()
        variables = {**(os.environ if environment is None else environment), "TMPDIR": str(self.folder)}
        try:
            with open(self.log, "w", encoding="utf-8") as log:
                self._group = GuardedProcess(
                    list(command),
                    self.folder,
                    env=variables,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    encoding="utf-8",
                    errors="replace",
                )
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise UserError(
                f"the {name} worker does not start ({error.strerror}: {command[0]})",
                f"Run: sparsedeploy runtime check {name}.",
            ) from error
        self._process = self._group.popen
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.ready = self._result(self._replies(0, "start", timeout))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, operation: str, *, timeout: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its result.

        Raises:
            UserError: the worker refused it, died, said something else than the protocol, or took too long.
        """
        return self._result(self._request(operation, arguments, timeout))

    def stream(self, operation: str, *, timeout: float | None = None, **arguments: Any) -> Iterator[dict[str, Any]]:
        """Send a request and yield its events as they come, and last its result; raises as :meth:`call` does.

        ``timeout`` holds for each event.
        """
        for reply in self._request(operation, arguments, timeout):
            yield reply["event"] if "event" in reply else reply["result"]

    def arrays(self, result: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Read and delete the arrays that a result names under ``arrays``."""
        loaded = {}
        for name, path in result["arrays"].items():
            loaded[name] = np.load(path, allow_pickle=False)
            os.unlink(path)
        return loaded

    def peak_memory(self) -> int | None:
        """The most bytes that the process and its children held, each at its own peak; None where unknown (Linux
        and Windows tell).
        """
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(self._process.pid)
            peaks = [_peak_memory(one) for one in (process, *process.children(recursive=True))]
            return sum(peak for peak in peaks if peak is not None) or None
        return None

    def close(self) -> None:
        """End the process: ask it by closing its input, kill it when it does not go within five seconds."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._group.end(5)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._reader.is_alive():
            self._reader.join(5)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def _request(self, operation: str, arguments: Mapping[str, Any], timeout: float | None) -> Iterator[dict[str, Any]]:
        self._number += 1
        message = json.dumps({"id": self._number, "op": operation, "arguments": arguments})
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(message + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise self._dead(operation) from error
        return self._replies(self._number, operation, self.timeout if timeout is None else timeout)

    def _replies(self, number: int, operation: str, timeout: float) -> Iterator[dict[str, Any]]:
        """The replies to one request, up to and with its result."""
        while True:
            try:
                line = self._lines.get(timeout=timeout)
            except queue.Empty:
                self._group.kill()
                raise UserError(
                    f"{self.name} did not answer '{operation}' within {timeout:g} s",
                    f"Raise the time limit, or use a smaller model. Its log: {self.log}.",
                ) from None
            if line is None:
                raise self._dead(operation)
            reply = _parse(line)
            if reply is not None and reply["id"] < number:
                continue  # what is left of a stream that was not read to its end
            if reply is None or reply["id"] != number:
                self._group.kill()
                raise UserError(
                    f"the {self.name} worker sent an unexpected line: {line.strip()[:120]!r}",
                    f"Its environment may be damaged: run sparsedeploy runtime check {self.name}. Its log: {self.log}.",
                )
            if "error" in reply:
                raise UserError(f"{self.name}: {reply['error']}", reply.get("fix") or f"Its log: {self.log}.")
            yield reply
            if "result" in reply:
                return

    def _result(self, replies: Iterator[dict[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for reply in replies:
            result = reply.get("result", result)
        return result

    def _dead(self, operation: str) -> UserError:
        """The error that tells how the process ended, with the telling lines of its log."""
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._group.kill()
            code = self._process.wait()
        if code < 0:
            end = f"was ended by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                end += " (the system may have run out of memory)"
        else:
            end = f"ended with exit code {code}"
        lines = telling_lines(self.log)
        said = f": {lines}" if lines else ""
        return UserError(f"{self.name} {end} during '{operation}'{said}", f"Its log: {self.log}.")


def _peak_memory(process: psutil.Process) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak: int | None = getattr(process.memory_info(), "peak_wset", None)
    return peak


def telling_lines(log: Path, count: int = 2) -> str:
    """The last lines of a log that name an error, else simply its last lines, as one line."""
    try:
        lines = [
            line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
    except OSError:
        return ""
    telling = [line for line in lines if _TELLING.search(line)]
    return " | ".join(line[:200] for line in (telling or lines)[-count:])


def _parse(line: str) -> dict[str, Any] | None:
    """A line of the protocol; None when it is something else."""
    try:
        reply = json.loads(line)
    except ValueError:
        return None
    if not isinstance(reply, dict) or not isinstance(reply.get("id"), int):
        return None
    return reply if {"event", "result", "error"} & reply.keys() else None


def new_log(name: str) -> Path:
    """A new log file in a folder of that name, where only the newest are kept."""
    folder = cache_folder("logs", name)
    for old in sorted(folder.glob("*.log"))[: 1 - _LOGS_KEPT]:
        old.unlink(missing_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    handle, path = tempfile.mkstemp(prefix=f"{stamp}-", suffix=".log", dir=folder)
    os.close(handle)
    return Path(path)
