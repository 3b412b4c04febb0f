"""An engine's process in a group of its own: signals reach what it starts, and a guard ends it when we are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

# Needs no package. Its input ends when this process does, however that comes about.
_GUARD = """
import os, shutil, signal, sys
sys.stdin.read()
try:
    os.killpg(int(sys.argv[1]), signal.SIGKILL)
except OSError:
    pass
shutil.rmtree(sys.argv[2], ignore_errors=True)
"""


class GuardedProcess:
    """A process that leads a group, which is killed when this process is gone, be it by SIGKILL.

    An engine that hangs in native code notices nothing by itself, nor do the processes that it started. A second, small
    process waits for the end of this one and kills the whole group. Linux has a signal for a parent's death, but it
    comes when the *thread* that started the process ends, reaches no grandchildren, and exists nowhere else.

    This holds on every POSIX system. Windows has no such groups: there a process that reads its standard input, as the
    workers do, ends by itself unless it hangs.

    Args:
        command: what to run.
        scratch: a temporary folder of the process, removed with it when this process is gone.
        options: of ``subprocess.Popen``.

    Raises:
        OSError: the command cannot be started.
    """

    def __init__(self, command: list[str], scratch: Path, **options: Any) -> None:
        self.popen: subprocess.Popen[Any] = subprocess.Popen(command, start_new_session=True, **options)
        self._guard: subprocess.Popen[bytes] | None = None
        if hasattr(os, "killpg"):
            guard = [sys.executable, "-I", "-S", "-c", _GUARD, str(self.popen.pid), str(scratch)]
            # A session of its own: Ctrl-C and whoever kills this process's group must not end the guard first.
            nowhere = subprocess.DEVNULL
            try:
                self._guard = subprocess.Popen(
                    guard, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True
                )
            except OSError:
                self.kill()
                raise

    def send(self, number: int) -> None:
        """Send a signal to the process and whatever it started."""
        with suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self.popen.pid, number)
            else:
                self.popen.send_signal(number)

    def kill(self, seconds: float = 5.0) -> None:
        """Kill the process and whatever it started, and wait so many seconds for its end."""
        self.send(getattr(signal, "SIGKILL", signal.SIGTERM))
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(seconds)

    def end(self, seconds: float) -> None:
        """Give the process so many seconds to end by itself, and let the guard go.

        What it started is killed with it when it does not end in time, and when it failed and so left it behind.
        """
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(seconds)
        if self.popen.returncode != 0:
            self.kill()
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
            assert self._guard.stdin is not None
            self._guard.stdin.close()
