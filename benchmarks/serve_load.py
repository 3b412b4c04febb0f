"""Load on ``sparsedeploy serve``: 1 to 32 clients on loopback, their latencies, and a stop under full load.

    python benchmarks/serve_load.py ARTIFACT --seconds 60 --output benchmarks/results/serve_load

Each number of clients sends one request after another for the given time, after one that warms the server up. At the
end the server is asked to stop (SIGTERM) while all clients of the last level are sending: a request counts as lost if
it was sent and got neither its whole answer nor a refusal.
"""

from __future__ import annotations

import argparse
import http.client
import json
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sparsedeploy.folders import write_json, write_text
from sparsedeploy.machine import this_machine


@dataclass
class Level:
    """What a number of clients measured.

    Attributes:
        latencies: seconds of every request that was answered.
        answers: kind of outcome -> how often; ``ok``, ``refused`` (503, or no connection) or ``lost``.
    """

    clients: int
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("ok", "refused", "lost"), 0))

    def row(self) -> tuple[str, ...]:
        """Its row of the table."""
        ordered = sorted(self.latencies)
        points = [
            ordered[min(len(ordered) - 1, int(part * len(ordered)))] for part in (0.5, 0.95, 0.99, 1.0) if ordered
        ]
        shown = [f"{1e3 * one:.0f}" for one in points] or ["-"] * 4
        return (
            str(self.clients),
            str(len(ordered)),
            f"{len(ordered) / self.seconds:.2f}",
            *shown,
            str(self.answers["refused"]),
            str(self.answers["lost"]),
        )


class Client(threading.Thread):
    """Sends requests until it is told to stop, and keeps what became of each."""

    def __init__(self, url: str, body: bytes, level: Level, stop: threading.Event, lock: threading.Lock) -> None:
        super().__init__(daemon=True)
        self.url, self.body, self.level, self.stopped, self.lock = urlsplit(url), body, level, stop, lock

    def run(self) -> None:
        while not self.stopped.is_set():
            started = time.perf_counter()
            outcome = self.one()
            with self.lock:
                self.level.answers[outcome] += 1
                if outcome == "ok":
                    self.level.latencies.append(time.perf_counter() - started)
            if outcome == "refused":
                time.sleep(0.05)

    def one(self) -> str:
        """A request on a connection of its own."""
        connection = http.client.HTTPConnection(self.url.hostname or "", self.url.port, timeout=600)
        try:
            connection.connect()
        except OSError:
            return "refused"
        try:
            connection.request("POST", self.url.path, self.body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            content = reply.read()
        except (OSError, http.client.HTTPException):
            return "lost"
        finally:
            connection.close()
        if reply.status == 503:
            return "refused"
        return "ok" if reply.status == 200 and json.loads(content) else "lost"


def main() -> None:
    arguments = _arguments()
    command = [sys.executable, "-m", "sparsedeploy", "serve", arguments.artifact, "--port", str(arguments.port)]
    command += ["--length", str(arguments.length)]
    if arguments.parallel is not None:
        command += ["--parallel", str(arguments.parallel)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        example = _wait(server)
        url = next(word for word in example if word.startswith("http"))
        body = json.loads(example[example.index("-d") + 1])
        for name in ("max_tokens", "max_new_tokens"):
            if name in body:
                body[name] = arguments.tokens
        first = time.perf_counter()
        Client(url, json.dumps(body).encode(), Level(1), threading.Event(), threading.Lock()).one()
        first = time.perf_counter() - first
        levels = [_load(url, body, count, arguments.seconds) for count in arguments.clients]
        metrics = _read(url, "/metrics")
        last, seconds = _stop_under_load(server, url, body, arguments.clients[-1])
    finally:
        server.kill()
    values = {
        "artifact": Path(arguments.artifact).name,
        "tokens": arguments.tokens,
        "parallel": arguments.parallel,
        "seconds": arguments.seconds,
        "first_request_seconds": first,
        "machine": asdict(this_machine()),
        "python": platform.python_version(),
        "levels": [asdict(level) for level in levels],
        "stop": {**asdict(last), "seconds_until_ended": seconds, "exit_code": server.returncode},
        "metrics": metrics,
    }
    text = _table(levels, last, seconds, values)
    print(text)
    if arguments.output:
        write_json(Path(f"{arguments.output}.json"), values)
        write_text(Path(f"{arguments.output}.md"), text)
    if sum(level.answers["lost"] for level in [*levels, last]):
        raise SystemExit("requests were lost")


def _load(url: str, body: dict[str, Any], count: int, seconds: float) -> Level:
    level, stop, lock = Level(count), threading.Event(), threading.Lock()
    clients = [Client(url, json.dumps(body).encode(), level, stop, lock) for _ in range(count)]
    started = time.perf_counter()
    for client in clients:
        client.start()
    stop.wait(seconds)
    stop.set()
    for client in clients:
        client.join()
    level.seconds = time.perf_counter() - started
    median = f"median {statistics.median(level.latencies):.2f} s" if level.latencies else "no answer"
    print(f"{count} clients: {level.answers}, {median}", file=sys.stderr)
    return level


def _stop_under_load(server: subprocess.Popen[str], url: str, body: dict[str, Any], count: int) -> tuple[Level, float]:
    """SIGTERM while every client sends; returns what became of the requests, and the seconds until the end."""
    level, stop, lock = Level(count), threading.Event(), threading.Lock()
    clients = [Client(url, json.dumps(body).encode(), level, stop, lock) for _ in range(count)]
    for client in clients:
        client.start()
    stop.wait(3)
    started = time.perf_counter()
    server.send_signal(signal.SIGTERM)
    server.wait(timeout=120)
    ended = time.perf_counter() - started
    stop.set()
    for client in clients:
        client.join()
    level.seconds = 3 + ended
    print(f"stop under {count} clients: {level.answers} in {ended:.1f} s", file=sys.stderr)
    return level, ended


def _wait(server: subprocess.Popen[str]) -> list[str]:
    """The words of the request that the server shows when it answers."""
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith("curl "):
            return shlex.split(line)
    raise SystemExit("the server did not start")


def _read(url: str, path: str) -> str:
    parts = urlsplit(url)
    with urllib.request.urlopen(f"{parts.scheme}://{parts.netloc}{path}") as reply:
        return str(reply.read().decode())


def _table(levels: list[Level], last: Level, seconds: float, values: dict[str, Any]) -> str:
    headers = ("clients", "requests", "requests/s", "p50 ms", "p95 ms", "p99 ms", "max ms", "refused", "lost")
    rows = [level.row() for level in levels]
    lines = [f"| {' | '.join(headers)} |", "|" + "---:|" * len(headers), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(
        [
            f"# Load on `serve`: {values['artifact']}, {values['tokens']} tokens an answer",
            "",
            f"{values['seconds']:g} s for each number of clients, on loopback, on {values['machine']['processor']}.",
            "",
            *lines,
            "",
            f"The first request of all, which is in no row, took {values['first_request_seconds']:.2f} s.",
            "",
            f"Asked to stop (SIGTERM) under {last.clients} clients, the server ended after {seconds:.1f} s with exit "
            f"code {values['stop']['exit_code']}: {last.answers['ok']} answered, {last.answers['refused']} refused, "
            f"{last.answers['lost']} lost.",
            "",
        ]
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact")
    numbers = [1, 2, 4, 8, 16, 32]
    parser.add_argument("--clients", type=lambda text: [int(part) for part in text.split(",")], default=numbers)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each number of clients")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--length", type=int, default=512, help="of a prompt and its answer together, at most")
    parser.add_argument("--parallel", type=int, help="requests that the server computes at once [default: serve's]")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--output", help="path of the results without its ending")
    return parser.parse_args()


if __name__ == "__main__":
    main()
