"""What stands before an engine's server: requests pass unchanged, are counted, and none is lost when it stops."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sparsedeploy.runtimes.front import Front, Meters


class Engine(BaseHTTPRequestHandler):
    """A server with plain, streamed and slow answers."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(asked.get("seconds", 0))
        usage = {"usage": {"prompt_tokens": 3, "completion_tokens": asked.get("tokens", 0)}}
        if asked.get("cut"):
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"half")
            self.close_connection = True
            return
        if not asked.get("stream"):
            body = json.dumps({"echo": asked, **usage}).encode()
            self.send_response(asked.get("code", 200))
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Engine", "yes")
            self.end_headers()
            self.wfile.write(body)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in [*(f"data: {at}\n\n" for at in range(asked["tokens"])), f"data: {json.dumps(usage)}\n\n"]:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part.encode()))
            self.wfile.flush()
            time.sleep(0.02)
        self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def engine() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def front(engine: ThreadingHTTPServer) -> Iterator[Front]:
    upstream = ("127.0.0.1", engine.server_address[1])
    front = Front(("127.0.0.1", 0), upstream, Meters("toy", "model"), health="/v2/ready")
    front.start(lambda: True)
    assert get(front, "/health") == (503, b'{"error": {"message": "the engine starts", "code": 503}}')
    front.ready = True
    yield front
    front.stop()


def post(front: Front, **asked: object) -> tuple[int, bytes, dict[str, str]]:
    request = urllib.request.Request(f"http://127.0.0.1:{front.port}/v1/completions", json.dumps(asked).encode())
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read(), dict(reply.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def get(front: Front, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{front.port}{path}", timeout=30) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def metrics(front: Front) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of /metrics, as Prometheus reads it."""
    code, text = get(front, "/metrics")
    assert code == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_answers_pass_unchanged_and_are_counted(front: Front) -> None:
    code, body, headers = post(front, tokens=5, prompt="é")
    assert code == 200
    assert json.loads(body)["echo"] == {"tokens": 5, "prompt": "é"}
    assert headers["X-Engine"] == "yes"
    assert post(front, code=418)[0] == 418
    code, body, headers = post(front, stream=True, tokens=4)
    assert body.count(b"data: ") == 5
    assert headers["Content-Type"] == "text/event-stream"
    found = metrics(front)
    path = ("path", "/v1/completions")
    assert found["sparsedeploy_requests_total", (("code", "200"), path)] == 2
    assert found["sparsedeploy_requests_total", (("code", "418"), path)] == 1
    assert found["sparsedeploy_generated_tokens_total", ()] == 9
    assert found["sparsedeploy_prompt_tokens_total", ()] == 9
    assert found["sparsedeploy_request_seconds_count", (path,)] == 3
    assert found["sparsedeploy_tokens_per_second_count", ()] == 2
    assert found["sparsedeploy_info", (("artifact", "model"), ("runtime", "toy"))] == 1
    assert found["sparsedeploy_requests_running", ()] == 0


def test_a_stream_comes_piece_by_piece(front: Front) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", front.port)
    connection.request("POST", "/v1/completions", json.dumps({"stream": True, "tokens": 20}))
    reply = connection.getresponse()
    started, arrived = time.perf_counter(), []
    while part := reply.read1():
        arrived.append((time.perf_counter() - started, part))
    assert len(arrived) > 5
    assert b"".join(part for _, part in arrived).count(b"data: ") == 21


def test_nothing_that_has_begun_is_lost(front: Front) -> None:
    """Eight slow requests run, the server drains: all are answered, a later one is told that it stops."""
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(post(front, seconds=0.6, tokens=1)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    while front._running < 8:
        time.sleep(0.01)
    left: list[int] = []
    drain = threading.Thread(target=lambda: left.append(front.drain(30)))
    drain.start()
    while not front.draining:
        time.sleep(0.01)
    code, body, _ = post(front)
    assert (code, json.loads(body)["error"]["message"]) == (503, "the server stops")
    assert get(front, "/health")[0] == get(front, "/v2/ready")[0] == 503
    drain.join()
    for thread in threads:
        thread.join()
    assert left == [0]
    assert answers == [200] * 8


def test_what_takes_too_long_is_told(front: Front) -> None:
    thread = threading.Thread(target=lambda: post(front, seconds=1.0))
    thread.start()
    while front._running < 1:
        time.sleep(0.01)
    assert front.drain(0.1) == 1
    thread.join()


def test_an_engine_that_is_gone_or_cuts_off(engine: ThreadingHTTPServer, front: Front) -> None:
    with pytest.raises((http.client.IncompleteRead, OSError)):
        post(front, cut=True)
    engine.shutdown()
    engine.server_close()
    code, body, _ = post(front)
    assert code == 502
    assert "the engine does not answer" in json.loads(body)["error"]["message"]


def test_health_follows_the_engine(engine: ThreadingHTTPServer) -> None:
    alive = True
    upstream = ("127.0.0.1", engine.server_address[1])
    front = Front(("127.0.0.1", 0), upstream, Meters("toy", "model"))
    front.ready = True
    front.start(lambda: alive)
    try:
        assert get(front, "/health") == (200, b'{"status": "ok"}')
        alive = False
        assert get(front, "/health")[0] == 503
        with pytest.raises(OSError, match="in use"):
            Front(("127.0.0.1", front.port), upstream, Meters("toy", "model"))
    finally:
        front.stop()


def test_bodies_without_a_length_are_refused(front: Front) -> None:
    with socket.create_connection(("127.0.0.1", front.port)) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
        )
        assert client.recv(1000).startswith(b"HTTP/1.1 413")
    connection = http.client.HTTPConnection("127.0.0.1", front.port)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Length", "9" * 12)
    connection.endheaders()
    assert connection.getresponse().status == 413
