"""The worker protocol against real child processes that behave and misbehave."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.runtimes.worker import Worker, telling_lines
from tests.runtimes.processes import has_ended, wait_until

SCRIPT = """
import json, os, signal, sys, time
import numpy as np

def send(**message):
    print(json.dumps(message), flush=True)

send(id=0, result={"pid": os.getpid()})
for line in sys.stdin:
    request = json.loads(line)
    number, op, arguments = request["id"], request["op"], request["arguments"]
    if op == "double":
        path = os.path.join(arguments["folder"], "out.npy")
        np.save(path, 2 * np.load(arguments["path"]))
        send(id=number, result={"arrays": {"out": path}})
    elif op == "count":
        for value in range(arguments["to"]):
            send(id=number, event={"value": value})
        send(id=number, result={"total": arguments["to"]})
    elif op == "refuse":
        send(id=number, error="the model is too large", fix="Use a smaller one.")
    elif op == "noise":
        print("Loading kernels ... done", flush=True)
    elif op == "foreign":
        send(id=number + 5, result={})
    elif op == "abort":
        print("loading", file=sys.stderr)
        print("Assertion at engine.cpp:42", file=sys.stderr)
        print("Please send us this trace", file=sys.stderr, flush=True)
        os.abort()
    elif op == "exit":
        print("nothing more to do", file=sys.stderr, flush=True)
        os._exit(3)
    elif op == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif op == "sleep":
        time.sleep(60)
    else:
        send(id=number, result={"op": op})
"""

# Whatever becomes of its input, this worker hangs, in native code that never lets go of the interpreter.
HANGING = """
import ctypes, json, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(json.dumps({"id": 0, "result": {"pids": [os.getpid(), child.pid]}}), flush=True)
ctypes.PyDLL(None).pause()
"""
PARENT = """
import json, sys
from sparsedeploy.runtimes.worker import Worker
worker = Worker([sys.executable, sys.argv[1]], name="toy")
print(json.dumps({"pids": worker.ready["pids"], "folder": str(worker.folder)}), flush=True)
worker.call("hang")
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Worker]:
    script = tmp_path / "worker.py"
    script.write_text(SCRIPT)

    def run(timeout: float = 60.0) -> Worker:
        return Worker([sys.executable, str(script)], name="toy", timeout=timeout)

    return run


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_arrays_travel_as_files(start: Callable[..., Worker]) -> None:
    with start() as worker:
        path = worker.folder / "in.npy"
        values = np.arange(6, dtype=np.float32).reshape(2, 3)
        np.save(path, values)
        result = worker.call("double", path=str(path), folder=str(worker.folder))
        assert np.array_equal(worker.arrays(result)["out"], 2 * values)
        assert not (worker.folder / "out.npy").exists()


def test_events_stream_and_a_stream_may_be_left(start: Callable[..., Worker]) -> None:
    with start() as worker:
        assert list(worker.stream("count", to=3)) == [{"value": 0}, {"value": 1}, {"value": 2}, {"total": 3}]
        assert next(worker.stream("count", to=1000)) == {"value": 0}
        assert worker.call("anything") == {"op": "anything"}


def test_close_ends_the_process_and_its_folder(start: Callable[..., Worker]) -> None:
    with start() as worker:
        pid = worker.ready["pid"]
        assert is_running(pid)
    assert not is_running(pid)
    assert not worker.folder.exists()
    assert worker.log.exists()


def test_refusal_keeps_the_worker_alive(start: Callable[..., Worker]) -> None:
    with start() as worker:
        with pytest.raises(UserError, match=r"^toy: the model is too large. Use a smaller one.$"):
            worker.call("refuse")
        assert worker.call("next") == {"op": "next"}


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        ("abort", r"toy was ended by SIGABRT during 'abort': Assertion at engine.cpp:42. Its log: "),
        ("exit", r"toy ended with exit code 3 during 'exit': nothing more to do. Its log: "),
        ("killed", r"toy was ended by SIGKILL \(the system may have run out of memory\) during 'killed'"),
    ],
)
def test_death_is_told_with_the_logs_words(start: Callable[..., Worker], operation: str, words: str) -> None:
    with start() as worker:
        with pytest.raises(UserError, match=words):
            worker.call(operation)
        with pytest.raises(UserError, match=r"during 'again'"):
            worker.call("again")
    assert worker.log.exists()


@pytest.mark.parametrize("operation", ["noise", "foreign"])
def test_anything_but_an_answer_is_refused(start: Callable[..., Worker], operation: str) -> None:
    with start() as worker, pytest.raises(UserError, match=r"toy worker sent an unexpected line"):
        worker.call(operation)
    assert not is_running(worker.ready["pid"])


def test_time_limit_ends_the_process(start: Callable[..., Worker]) -> None:
    with (
        start() as worker,
        pytest.raises(UserError, match=r"toy did not answer 'sleep' within 0.3 s. Raise the time limit"),
    ):
        worker.call("sleep", timeout=0.3)
    assert not is_running(worker.ready["pid"])


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_a_hanging_worker_and_its_children_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(HANGING)
    with subprocess.Popen([sys.executable, "-c", PARENT, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        told = json.loads(parent.stdout.readline())
        processes = [psutil.Process(pid) for pid in told["pids"]]
        parent.kill()
    try:
        wait_until(lambda: all(has_ended(process) for process in processes))
        wait_until(lambda: not Path(told["folder"]).exists())
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_what_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"toy worker does not start .*runtime check toy"):
        Worker([str(tmp_path / "python")], name="toy")
    with pytest.raises(UserError, match=r"toy ended with exit code 1 during 'start': ZeroDivisionError: "):
        Worker([sys.executable, "-c", "1 / 0"], name="toy")


def test_log_names_the_error_or_ends_with_the_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\n\nValueError: bad shape\n 1# 0x00007f\nSend this trace\n")
    assert telling_lines(log) == "ValueError: bad shape"
    log.write_text("one\ntwo\nthree\n")
    assert telling_lines(log) == "two | three"


def test_only_the_newest_logs_are_kept(start: Callable[..., Worker], home: Path) -> None:
    (home / "logs" / "toy").mkdir(parents=True)
    for number in range(30):
        (home / "logs" / "toy" / f"20200101-{number:06}.log").write_text("old")
    with start() as worker:
        kept = sorted((home / "logs" / "toy").iterdir())
    assert len(kept) == 20
    assert worker.log in kept
    assert kept[0].name == "20200101-000011.log"
