"""What stands before an engine's server: it passes requests on, measures them, and lets them end when it is stopped.

``/metrics`` speaks Prometheus' text format, ``/health`` says whether requests are taken. While it drains, requests that
have begun get their whole answer and new ones are refused with status 503.
"""

from __future__ import annotations

import http.client
import json
import re
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

METRICS, HEALTH = "/metrics", "/health"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SPEEDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
# Of one hop only, as RFC 9110 has it.
_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-connection", "host"}
_CHUNK = 1 << 16
_LARGEST_BODY = 64 << 20
_KEPT = 1 << 20  # bytes of an answer that are read for its counts
_USAGE = re.compile(
    rb'"(?P<name>prompt_tokens|completion_tokens|tokens_evaluated|tokens_predicted)"\s*:\s*(?P<count>\d+)'
)
_GRACE = 0.25


class Meters:
    """What is counted, in a registry of its own."""

    def __init__(self, runtime: str, artifact: str) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry}
        Gauge("sparsedeploy_info", "What is served.", ["runtime", "artifact"], **kept).labels(runtime, artifact).set(1)
        self.requests = Counter("sparsedeploy_requests", "Requests that were answered.", ["path", "code"], **kept)
        self.running = Gauge("sparsedeploy_requests_running", "Requests that are being answered.", **kept)
        self.seconds = Histogram(
            "sparsedeploy_request_seconds", "Until the last byte.", ["path"], buckets=_SECONDS, **kept
        )
        self.first = Histogram(
            "sparsedeploy_first_byte_seconds", "Until the first byte of the answer.", ["path"], buckets=_SECONDS, **kept
        )
        self.prompt_tokens = Counter("sparsedeploy_prompt_tokens", "Tokens of prompts, as the engine counts.", **kept)
        self.generated = Counter("sparsedeploy_generated_tokens", "Tokens generated, as the engine counts.", **kept)
        self.speed = Histogram(
            "sparsedeploy_tokens_per_second", "Generated tokens of a request by its time.", buckets=_SPEEDS, **kept
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Front:
    """The server that clients see.

    Args:
        address: to listen on; ``upstream`` is the engine's.
        health: the engine's own path for that.

    Raises:
        OSError: the address cannot be had.
    """

    def __init__(
        self,
        address: tuple[str, int],
        upstream: tuple[str, int],
        meters: Meters,
        *,
        health: str = HEALTH,
    ) -> None:
        front = self

        class Handler(_Handler):
            owner = front

        self.upstream, self.meters = upstream, meters
        self.alive: Callable[[], bool] = lambda: False
        self.health_paths = {HEALTH, health}
        self.ready = self.draining = False
        self._running = 0
        self._idle = threading.Condition()
        self._server = _Server(address, Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="front", daemon=True)

    def start(self, alive: Callable[[], bool]) -> None:
        """Answer; requests are refused until ``ready`` is set, and when the engine is not alive."""
        self.alive = alive
        self._thread.start()

    @property
    def why_not(self) -> str | None:
        """Why no request is taken; None when they are."""
        if self.draining:
            return "the server stops"
        if not self.alive():
            return "the engine has ended"
        return None if self.ready else "the engine starts"

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @contextmanager
    def request(self) -> Iterator[bool]:
        """One request; yields whether it is taken."""
        with self._idle:
            taken = self.why_not is None
            self._running += taken
        self.meters.running.set(self._running)
        try:
            yield taken
        finally:
            with self._idle:
                self._running -= taken
                self._idle.notify_all()
            self.meters.running.set(self._running)

    def drain(self, seconds: float) -> int:
        """Refuse new requests and wait until those that have begun are answered; returns how many were not."""
        with self._idle:
            self.draining = True
            self._idle.wait_for(lambda: self._running == 0, seconds)
            left = self._running
        # Whoever connects just now is told that the server stops, and is not cut off.
        time.sleep(_GRACE)
        return left

    def stop(self) -> None:
        """Close the address; whoever has connected by then is told so first."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.timeout = 0
        while select.select([self._server], [], [], 0)[0]:
            self._server.handle_request()
        self._server.server_close()
        time.sleep(_GRACE)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""


class _Handler(BaseHTTPRequestHandler):
    owner: Front
    protocol_version = "HTTP/1.1"
    timeout = 120

    def log_message(self, format: str, *arguments: Any) -> None:
        """The engine keeps the log."""

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        owner = self.owner
        if path == METRICS:
            self._send(200, owner.meters.text(), CONTENT_TYPE_PLAIN_0_0_4)
        elif path in owner.health_paths:
            if (reason := owner.why_not) is None:
                self._send(200, b'{"status": "ok"}', "application/json")
            else:
                self._refuse(503, reason)
        else:
            with owner.request() as taken:
                code = self._pass_on(path) if taken else self._refuse(503, owner.why_not or "the server stops")
            owner.meters.requests.labels(path, str(code)).inc()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_OPTIONS = answer

    def _pass_on(self, path: str) -> int:
        """Let the engine answer; returns the status."""
        meters, started = self.owner.meters, time.perf_counter()
        size = self.headers.get("Content-Length", "0")
        if not size.isdigit() or int(size) > _LARGEST_BODY or "Transfer-Encoding" in self.headers:
            return self._refuse(413, f"a body needs a Content-Length of at most {_LARGEST_BODY} bytes")
        body = self.rfile.read(int(size))
        upstream = http.client.HTTPConnection(*self.owner.upstream)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
            upstream.request(self.command, self.path, body=body, headers={**headers, "Connection": "close"})
            reply = upstream.getresponse()
        except (OSError, http.client.HTTPException) as error:
            upstream.close()
            return self._refuse(502, f"the engine does not answer ({type(error).__name__})")
        meters.first.labels(path).observe(time.perf_counter() - started)
        tail = b""
        try:
            self._start(reply)
            while part := reply.read1(_CHUNK):
                self._write(part, reply)
                tail = (tail + part)[-_KEPT:]
            self._end(reply)
        except (OSError, http.client.HTTPException):  # either side went away
            self.close_connection = True
            return 499
        finally:
            upstream.close()
        seconds = time.perf_counter() - started
        meters.seconds.labels(path).observe(seconds)
        self._count(tail, seconds)
        return reply.status

    def _start(self, reply: http.client.HTTPResponse) -> None:
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in _HOP and name.lower() not in ("content-length", "date", "server"):
                self.send_header(name, value)
        if reply.length is not None or self.command == "HEAD":
            self.send_header("Content-Length", str(reply.length or reply.getheader("Content-Length") or 0))
        else:
            self.send_header("Transfer-Encoding", "chunked")
        if self.owner.draining:
            self.send_header("Connection", "close")
            self.close_connection = True
        self._chunked = reply.length is None and self.command != "HEAD"
        self.end_headers()

    def _write(self, part: bytes, reply: http.client.HTTPResponse) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if self._chunked else part)
        self.wfile.flush()

    def _end(self, reply: http.client.HTTPResponse) -> None:
        if self._chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _count(self, tail: bytes, seconds: float) -> None:
        """The engine's own counts, which stand at the end of an answer."""
        counts: dict[str, int] = {match["name"].decode(): int(match["count"]) for match in _USAGE.finditer(tail)}
        prompt = counts.get("prompt_tokens", counts.get("tokens_evaluated", 0))
        made = counts.get("completion_tokens", counts.get("tokens_predicted", 0))
        self.owner.meters.prompt_tokens.inc(prompt)
        self.owner.meters.generated.inc(made)
        if made and seconds > 0:
            self.owner.meters.speed.observe(made / seconds)

    def _refuse(self, code: int, reason: str) -> int:
        self.close_connection = True
        with suppress(OSError):
            self._send(code, json.dumps({"error": {"message": reason, "code": code}}).encode(), "application/json")
        return code

    def _send(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
