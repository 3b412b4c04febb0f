"""A small runtime of our own: a wheel written by hand and a worker, so that real installations need no network."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

WORKER = """
import json, sys
import toy_engine
print(json.dumps({"id": 0, "result": {"greeting": toy_engine.GREETING}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    result = {"python": sys.version.split()[0], "versions": {}, "hardware": {}, "largest_difference": 0.0}
    print(json.dumps({"id": request["id"], "result": result}), flush=True)
"""


def write_wheel(folder: Path, version: str, code: str) -> Path:
    """A wheel of ``toy-engine`` whose module holds ``code``."""
    path = folder / f"toy_engine-{version}-py3-none-any.whl"
    info = f"toy_engine-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("toy_engine.py", code)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: toy-engine\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def write_runtime(export: Path, requirement: str) -> Path:
    """The folder ``export/toy`` of a runtime that needs ``requirement``."""
    folder = export / "toy"
    folder.mkdir(parents=True, exist_ok=True)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    (folder / "runtime.yaml").write_text(
        f"""
title: Toy
summary: a runtime for tests
targets: [toy]
versions: [toy-engine]
python: {{min: "{version}", max: "{version}"}}
systems: [Linux, Darwin, Windows]
machines: {{x86_64: [], aarch64: []}}
imports: [toy_engine]
environment: {{TOY_SETTING: "1"}}
"""
    )
    (folder / "requirements.txt").write_text(f"--no-index\n{requirement}\n")
    (folder / "worker.py").write_text(WORKER)
    return folder
