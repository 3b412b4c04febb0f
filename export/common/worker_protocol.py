"""What every ``worker.py`` shares: it answers requests, one JSON line each, in the engine's own environment.

Needs only the standard library. A request comes on standard input (``{"id": 1, "op": "load", "arguments": {...}}``);
the replies go to the real standard output: any number of ``{"id": 1, "event": {...}}``, then
``{"id": 1, "result": {...}}`` or ``{"id": 1, "error": "...", "fix": "..."}``. The first line, with id 0, says that the
engine was imported. Arrays travel as .npy files named in the arguments and results. Whatever native code prints goes to
standard error.

Operations: ``info``, ``check``, ``load``, ``logits``, ``generate``, ``measure``, as ``sparsedeploy/runtimes/engine.py``
calls them. ``load`` and ``measure`` get ``batch`` only when it is more than 1, which a runtime allows by ``max_batch``
in its ``runtime.yaml``; ``profile: true`` there says that it answers ``profile``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Generator
from typing import Any, TextIO

# What an engine imports stays to the end: Python need not look through all of it for garbage whenever it has grown.
gc.set_threshold(700, 10, 1000)


class BadRequest(Exception):
    """A request that the user can fix."""

    def __init__(self, message: str, fix: str | None = None) -> None:
        self.fix = fix
        super().__init__(message)


def take_standard_output() -> TextIO:
    """Keep the real standard output for the protocol and send everything else that is printed to standard error."""
    sys.stdout.flush()
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return protocol


def serve(server: Any, protocol: TextIO) -> None:
    """Answer requests until standard input ends.

    Args:
        server: has a method for each operation, which takes the request's arguments and returns its result, or is a
            generator that yields events and returns the result; ``info`` is what it says when it is ready.
        protocol: what :func:`take_standard_output` returned.
    """
    _send(protocol, {"id": 0, "result": server.info()})
    for line in sys.stdin:
        _answer(server, json.loads(line), protocol)


def _answer(server: Any, request: dict[str, Any], protocol: TextIO) -> None:
    number = request["id"]
    try:
        result = getattr(server, request["op"])(**request["arguments"])
        if isinstance(result, Generator):
            result = _send_events(protocol, number, result)
        _send(protocol, {"id": number, "result": result})
    except BadRequest as error:
        _send(protocol, {"id": number, "error": str(error), "fix": error.fix})
    except Exception as error:
        traceback.print_exc()
        _send(protocol, {"id": number, "error": f"{type(error).__name__}: {error}", "fix": None})


def _send_events(
    protocol: TextIO, number: int, events: Generator[dict[str, Any], None, dict[str, Any]]
) -> dict[str, Any]:
    """Send each event as it comes and return what the generator returns."""
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            return dict(end.value)
        _send(protocol, {"id": number, "event": event})


def _send(protocol: TextIO, message: dict[str, Any]) -> None:
    protocol.write(json.dumps(message) + "\n")
    protocol.flush()
