"""What ``sparsedeploy serve`` tells a runtime's ``server.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

MODEL = "model"  # the name that requests use


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those that are for the engine's own server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="The exported folder.")
    parser.add_argument("--scratch", type=Path, required=True, help="A folder that is deleted afterwards.")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--length", type=int, required=True, help="Tokens of a prompt and its answer together.")
    parser.add_argument("--chunk", type=int, required=True, help="Prompt tokens run at once, in fixed shapes.")
    parser.add_argument("--parallel", type=int, required=True, help="Requests that are computed at once.")
    parser.add_argument("--cores", type=int, required=True)
    return parser.parse_known_args()
