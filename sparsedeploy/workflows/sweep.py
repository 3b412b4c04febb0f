"""The job ``sweep``: a grid of rates, methods, allocations and recoveries; each cell is a folder that processes fill.

A cell runs the command line itself (``prune`` or ``recover``, then ``eval``), so what it did can be repeated by hand,
and a process that dies loses that cell only. Finished cells are kept: the same sweep goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsedeploy import progress
from sparsedeploy.calibration.documents import content_sha256
from sparsedeploy.checkpoint.manifest import load_manifest
from sparsedeploy.conversion import plain_options, typed_words
from sparsedeploy.errors import UserError
from sparsedeploy.folders import locked, write_json, write_text
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.low_rank import FOLDER as ADAPTER
from sparsedeploy.models.options import LoadOptions
from sparsedeploy.models.tensor_files import TensorFiles
from sparsedeploy.quality.evaluate import named_texts
from sparsedeploy.quality.options import EvalOptions, TextOptions
from sparsedeploy.reading import read_object
from sparsedeploy.recovery.options import DataOptions
from sparsedeploy.registry import RECOVERIES
from sparsedeploy.reporting.sweep import html_page, markdown_table, marked
from sparsedeploy.runtimes.process_group import GuardedProcess
from sparsedeploy.version import __version__
from sparsedeploy.workflows.options import RecoverOptions
from sparsedeploy.workflows.state_file import read_state, write_state
from sparsedeploy.workflows.sweep_file import DENSE, Cell, Sweep

RESULT, REPORT = "cell.json", "sweep"
_DELETE = "Delete it and run the same sweep again."
_CHECKPOINT, _QUALITY, _LOG = "checkpoint", "quality.json", "log.txt"
# Not `-m`, which would import from the folder that the sweep was started in (so would `-c`, by an empty entry).
_START = "import sys; sys.path[:] = filter(None, sys.path); from sparsedeploy.__main__ import main; main()"
_BITS = 16
_DIVERGED = "the model has diverged"  # what eval says of it
_RUNNING: set[GuardedProcess] = set()


def run_sweep(
    sweep: Sweep,
    output: Path,
    *,
    jobs: int = 1,
    load: LoadOptions = LoadOptions(),
    on: str = "local",
    command: str = "",
) -> dict[str, Any]:
    """Fill every cell that is not there yet, ``jobs`` at a time, and write the report.

    Args:
        load: how every command loads models.
        on: ``local`` processes, or ``ray`` workers.
        command: what repeats the sweep, for the report.

    Raises:
        UserError: cells of another sweep, or cells that failed (the others are kept, and the report is written).
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file", "Name a folder.")
    with locked(output, (sweep.folder, *sweep.quality.text.data)):
        texts = {text for text in (sweep.calibration, sweep.train.get("data")) if text}
        texts |= set(named_texts(sweep.quality.text.data).values())
        known = {
            "model_sha256": model_sha256(sweep.folder),
            "texts": {text: content_sha256(text) for text in sorted(texts)},
            "dtype": load.dtype,
            "device": load.device.partition(":")[0],
            "sparsedeploy": __version__,
        }
        arguments = typed_words(LoadOptions, asdict(load))
        work = {cell.name: _work(sweep, cell, output, known, arguments, jobs) for cell in sweep.cells}
        finished = {name for name, item in work.items() if item.finished()}
        if finished:
            progress.note(f"{len(finished)} of {len(work)} cells are there already")
        waiting = [item for name, item in work.items() if name not in finished]
        for item in waiting:
            if item.request["recipe"]:
                write_text(_recipe(Path(item.folder)), yaml.safe_dump(item.request["recipe"], sort_keys=False))
        start = _ray_starter() if on == "ray" else _run_local
        _run_all(waiting, finished, start, jobs)
        report = collect(sweep, output, command)
        write_json(output / f"{REPORT}.json", report)
        write_text(output / f"{REPORT}.md", markdown_table(report["cells"]))
        write_text(output / f"{REPORT}.html", html_page(report))
    failed = [cell for cell in report["cells"] if cell["error"]]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(work)} cells failed; {failed[0]['name']}: {failed[0]['error']}",
            "Run the same sweep again: finished cells are kept.",
        )
    return report


@dataclass(frozen=True)
class Work:
    """What fills a cell, as plain data that travels to a worker.

    Attributes:
        commands: in order; each is left out when the file or folder it makes is there.
        request: what decides the result.
    """

    folder: str
    base: str | None
    commands: tuple[tuple[str, tuple[str, ...]], ...]
    request: dict[str, Any]
    threads: int

    @property
    def name(self) -> str:
        return Path(self.folder).name

    def finished(self) -> bool:
        """Whether the cell is filled.

        Raises:
            UserError: by another sweep.
        """
        path = Path(self.folder) / RESULT
        if not path.exists():
            return False
        stored = read_state(path, fix=_DELETE)
        asked, known = json.loads(json.dumps(self.request)), stored["request"]
        if different := [key for key in asked if known.get(key) != asked[key]]:
            raise UserError(
                f"{self.folder} is a cell of another sweep ({', '.join(different)} differ)",
                "Choose another --output, or delete the cell.",
            )
        return stored["error"] is None


def _recipe(cell: Path) -> Path:
    return cell / "recipe.yaml"


def _work(
    sweep: Sweep, cell: Cell, output: Path, known: Mapping[str, Any], arguments: Sequence[str], jobs: int
) -> Work:
    folder = (output / cell.name).absolute()
    checkpoint = folder / _CHECKPOINT
    commands: list[tuple[str, tuple[str, ...]]] = []
    if cell.recover is not None:
        assert cell.base is not None
        flags = typed_words(RecoverOptions, {**cell.recover, "data": None}, method="--method")
        method = RECOVERIES.get(cell.recover["method"])
        flags += typed_words(DataOptions, sweep.train) if method.traits["trains"] else []
        base = (output / cell.base / _CHECKPOINT).absolute()
        commands.append((_CHECKPOINT, ("recover", str(base), "-o", str(checkpoint), "--resume", *flags, *arguments)))
    elif cell.recipe:
        recipe = str(_recipe(folder))
        made = ("prune", sweep.model, "-o", str(checkpoint), "--resume", "--recipe", recipe, *arguments)
        commands.append((_CHECKPOINT, made))
    model = str(checkpoint) if commands else sweep.model
    flags = [*typed_words(TextOptions, asdict(sweep.quality.text)), *typed_words(EvalOptions, asdict(sweep.quality))]
    commands.append((_QUALITY, ("eval", model, *flags, "-o", str(folder / _QUALITY), *arguments)))
    request = {
        **known,
        "recipe": dict(cell.recipe),
        "recover": cell.recover,
        "base": cell.base,
        "train": dict(sweep.train) if cell.recover else None,
        "eval": plain_options(sweep.quality),
    }
    return Work(str(folder), cell.base, tuple(commands), request, max(1, (os.cpu_count() or 1) // jobs))


def _run_all(waiting: list[Work], finished: set[str], start: Callable[[Work], Any], jobs: int) -> None:
    """Run cells when their base is there; those whose base failed are left out."""
    failed: set[str] = set()
    with (
        ThreadPoolExecutor(jobs) as pool,
        progress.bar("sweep", len(waiting), "cells") as advance,
    ):
        running: dict[Future[str | None], Work] = {}
        try:
            while waiting or running:
                for item in list(waiting):
                    if item.base in failed:
                        waiting.remove(item)
                        failed.add(item.name)
                        _record(item, f"{item.base}, which it starts from, failed", 0.0)
                        advance(1, f"{item.name}: left out")
                    elif len(running) < jobs and (item.base is None or item.base in finished):
                        waiting.remove(item)
                        running[pool.submit(start, item)] = item
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    item = running.pop(future)
                    error = future.result()
                    (failed if error else finished).add(item.name)
                    advance(1, f"{item.name}: {error or 'done'}")
        except BaseException:
            for process in list(_RUNNING):
                process.kill()
            pool.shutdown(cancel_futures=True)
            raise


def _run_local(work: Work) -> str | None:
    """Fill a cell by processes of its own; returns what went wrong, in one line."""
    folder = Path(work.folder)
    began = time.perf_counter()
    error = None
    _record(work, "interrupted", 0.0)  # what the folder holds from now on belongs to this request
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment = {"OMP_NUM_THREADS": str(work.threads), **os.environ, **path}
    for made, arguments in work.commands:
        if (folder / made).exists():  # by a run that was interrupted
            continue
        command = [sys.executable, "-c", _START, *arguments, "--quiet"]
        with open(folder / _LOG, "ab") as log, tempfile.TemporaryDirectory() as scratch:
            start = log.tell()
            process = GuardedProcess(
                command, Path(scratch), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            _RUNNING.add(process)
            try:
                code = process.popen.wait()
            finally:
                _RUNNING.discard(process)
                process.end(0)
        if code:
            error = _reason(folder / _LOG, start, code)
            break
    _record(work, error, time.perf_counter() - began)
    return None if error is None or _DIVERGED in error else error


def _reason(log: Path, start: int, code: int) -> str:
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    if lines:
        return lines[-1].removeprefix("error: ")
    return f"its process was killed by signal {-code}" if code < 0 else f"its process ended with code {code}, see {log}"


def _record(work: Work, error: str | None, seconds: float) -> None:
    """Write the cell's result."""
    folder = Path(work.folder)
    result: dict[str, Any] = {"perplexity": None, "achieved": 0.0, "adapter": False}
    checkpoint = folder / _CHECKPOINT
    diverged = error is not None and _DIVERGED in error
    if error is None or diverged:
        if checkpoint.is_dir():
            manifest = load_manifest(checkpoint)
            modules, grid = manifest.modules.values(), manifest.quantization
            result |= {
                "achieved": manifest.achieved,
                "zeros": sum(module.zeros for module in modules),
                "size": sum(module.rows * module.columns for module in modules),
                "bits": grid.bits if grid else _BITS,
                "scales": sum(module.rows * grid.groups(module.columns) for module in modules) if grid else 0,
                "pattern": manifest.plan.pattern,
                "adapter": (checkpoint / ADAPTER).is_dir(),
            }
        if not diverged:
            result["perplexity"] = read_object(folder / _QUALITY, fix="Delete it.")["perplexity"]
    commands = [shlex.join(["sparsedeploy", *arguments]) for _, arguments in work.commands]
    write_state(
        folder / RESULT,
        {
            "request": work.request,
            "error": None if diverged else error,
            "seconds": round(seconds, 1),
            "commands": commands,
            **result,
        },
    )


def _ray_starter() -> Callable[[Work], str | None]:
    """Fill cells on the workers of a Ray cluster, which share the output folder.

    Raises:
        UserError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--on ray needs the package ray", "Install it: pip install 'sparsedeploy[ray]'.") from error
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, include_dashboard=False)
    remote = ray.remote(max_retries=0)(_run_local)

    def start(work: Work) -> str | None:
        try:
            found: str | None = ray.get(remote.remote(work))
            return found
        except ray.exceptions.RayError as error:
            reason = f"its worker was lost ({type(error).__name__})"
            _record(work, reason, 0.0)
            return reason

    return start


def collect(sweep: Sweep, output: Path, command: str) -> dict[str, Any]:
    """The report: every cell's figures, the Pareto front of size and perplexity, and what can be shipped."""
    weights = sum(math.prod(tensor.shape) for _, tensor in TensorFiles(sweep.folder).items())
    recipes = {cell.name: cell.recipe for cell in sweep.cells}
    rows = []
    for cell in sweep.cells:
        path = output / cell.name / RESULT
        stored: dict[str, Any] = {"error": "not run", "perplexity": None}
        if path.exists():
            stored = read_state(path, fix=_DELETE)
        prune = recipes[cell.base or cell.name].get("prune", {})
        rows.append(
            {
                "name": cell.name,
                "method": prune.get("method"),
                "allocation": prune.get("allocation"),
                "recovery": cell.recover["method"] if cell.recover else None,
                "pattern": stored.get("pattern", "dense"),
                "sparsity": stored.get("achieved", 0.0),
                "perplexity": stored["perplexity"],
                "packed_bytes": _packed_bytes(weights, stored),
                "adapter": stored.get("adapter", False),
                "seconds": stored.get("seconds"),
                "error": stored.get("error"),
                "commands": stored.get("commands", []),
            }
        )
    return {"model": sweep.model, "command": command, "eval": plain_options(sweep.quality), "cells": marked(rows)}


def _packed_bytes(weights: int, stored: Mapping[str, Any]) -> int:
    """16-bit values of the weights that are left, or their codes and scales, and a bit for each that could have been
    pruned.
    """
    size, bits = stored.get("size", 0), stored.get("bits", _BITS)
    left = bits * (size - stored.get("zeros", 0)) + _BITS * stored.get("scales", 0)
    return int(_BITS // 8 * (weights - size) + (left + size) // 8)


_NUMBER = r"(\d+(?:\.\d+)?)"
_SMALLEST = re.compile(rf"\s*smallest within {_NUMBER} ?% of dense\s*")
_BEST = re.compile(rf"\s*best below {_NUMBER} ?MB\s*")


def check_wish(wish: str) -> None:
    """Refuse a wish that cannot be read.

    Raises:
        UserError: it is not ``smallest within 5 % of dense`` or ``best below 300 MB`` with other numbers.
    """
    if not _SMALLEST.fullmatch(wish) and not _BEST.fullmatch(wish):
        raise UserError(
            f"cannot read the wish '{wish[:80]}'", "Ask for 'smallest within 5 % of dense' or 'best below 300 MB'."
        )


def picked(cells: Sequence[Mapping[str, Any]], wish: str) -> Mapping[str, Any]:
    """The pruned cell that a wish names; see :func:`check_wish`.

    Raises:
        UserError: no cell fulfils it.
    """
    check_wish(wish)
    able = [cell for cell in cells if cell["deployable"] and cell["name"] != DENSE]
    if found := _SMALLEST.fullmatch(wish):
        dense = next(cell["perplexity"] for cell in cells if cell["name"] == DENSE)
        if dense is None:
            raise UserError("the dense model has diverged on this text", "Evaluate on another text.")
        fitting = [cell for cell in able if cell["perplexity"] <= dense * (1 + float(found[1]) / 100)]
        order = ("packed_bytes", "perplexity")
    else:
        found = _BEST.fullmatch(wish)
        assert found is not None
        fitting = [cell for cell in able if cell["packed_bytes"] < float(found[1]) * 1e6]
        order = ("perplexity", "packed_bytes")
    if not fitting:
        raise UserError(f"no cell is the {wish.strip()}", "Ask for less, or add rates and methods to the sweep.")
    return min(fitting, key=lambda cell: [cell[name] for name in order])
