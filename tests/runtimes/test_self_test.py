"""An engine that computes something else than the export is refused on its first load; the verdict is remembered."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsedeploy import progress
from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.artifacts.known_answer import (
    TOKENS,
    KnownAnswer,
    distance,
    largest_difference,
    load_known_answer,
    save_known_answer,
    tolerance,
)
from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.errors import UserError
from sparsedeploy.formats import packed as packing
from sparsedeploy.formats import quantized
from sparsedeploy.formats.config import BITMASK, PackedConfig
from sparsedeploy.models.loading import load_config
from sparsedeploy.resources import cache_folder
from sparsedeploy.runtimes.engine import Deployment, find_deployment, load, open_model
from sparsedeploy.runtimes.environments import Environment, require
from sparsedeploy.runtimes.options import EngineOptions, ServeOptions
from sparsedeploy.runtimes.self_test import _lengths
from sparsedeploy.runtimes.serving import serve
from sparsedeploy.runtimes.specification import load_runtime
from sparsedeploy.runtimes.worker import Worker
from sparsedeploy.targets.check import Reference, compare_logits
from sparsedeploy.targets.registry import export_checkpoint
from sparsedeploy.workflows.options import PruneOptions
from sparsedeploy.workflows.prune import prune
from tests.formats.test_transformers import save_sparse_model
from tests.runtimes.artifacts import refresh
from tests.runtimes.exported import export_small
from tests.small_models import byte_tokenizer, random_model, save_model


@pytest.fixture
def verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of our own for verdicts; the runtimes and the compiled kernels stay where they are."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("runtimes", "kernels"):
        (home / name).symlink_to(cache_folder(name))
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(home))
    return home / "verdicts"


@pytest.fixture(scope="module")
def torch_worker() -> Iterator[Worker]:
    """PyTorch's process, for all models of these tests: it takes seconds to start and holds any number of them."""
    with require("torch").worker() as worker:
        yield worker


@dataclasses.dataclass(frozen=True)
class Running(Environment):
    """The environment of a worker that runs already."""

    running: Worker

    def worker(self, timeout: float = 600.0) -> Any:
        return contextlib.nullcontext(self.running)


def in_torch(folder: Path, worker: Worker) -> Deployment:
    """A folder on PyTorch, in the process that runs already."""
    found = find_deployment(folder, "torch")
    environment = Running(found.runtime, found.environment.python, worker)
    return dataclasses.replace(found, environment=environment)


def packed(folder: Path) -> Path:
    save_sparse_model(folder / "dense", "llama", torch.float32)
    export_checkpoint(folder / "dense", "vllm", folder / "packed")
    return folder / "packed"


SIZES = {"prompt_length": 80, "new_tokens": 8, "cores": 1}


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.usefixtures("deepsparse_runtime")
def test_deepsparse_with_one_wrong_weight(verdicts: Path, tmp_path: Path) -> None:
    right = export_small(tmp_path, "llama", 0.5).folder
    with open_model(right, **SIZES):
        pass
    (verdict,) = [json.loads(path.read_text()) for path in verdicts.iterdir()]
    assert verdict["passed"]
    assert verdict["tokens"] == TOKENS
    assert verdict["difference"] < 1e-5

    wrong = shutil.copytree(right, tmp_path / "wrong")
    graph = onnx.load(wrong / "model.onnx")
    matrix = next(tensor for tensor in graph.graph.initializer if tensor.name.endswith("layers.1.mlp.up_proj.weight.T"))
    values = onnx.numpy_helper.to_array(matrix).copy()
    values[:, 3] = -values[:, 3]
    matrix.raw_data = values.tobytes()
    onnx.save(graph, wrong / "model.onnx")
    refresh(wrong)
    with (
        pytest.raises(UserError, match=r"DeepSparse computes .*wrong wrongly on this machine: logits differ") as caught,
        open_model(wrong, **SIZES),
    ):
        pass
    assert "\n" not in str(caught.value)
    with (
        pytest.raises(UserError, match="wrongly on this machine"),
        serve(wrong, ServeOptions(length=80, port=0), EngineOptions(cores=1)),
    ):
        pass


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.usefixtures("deepsparse_runtime")
def test_deepsparse_with_wrong_integers(verdicts: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    options = {"int8": True, "data": str(text), "sequences": 4, "windows": 0}
    right = export_checkpoint(tmp_path / "model", "deepsparse", tmp_path / "right", options)
    assert right.self_test is not None
    with open_model(tmp_path / "right", **SIZES):
        pass
    assert [json.loads(path.read_text())["passed"] for path in verdicts.iterdir()] == [True]
    for number, end in enumerate(("layers.0.mlp.up_proj.weight.T", "layers.1.self_attn.o_proj.weight.T")):
        wrong = shutil.copytree(tmp_path / "right", tmp_path / f"wrong{number}")
        graph = onnx.load(wrong / "model.onnx")
        matrix = next(tensor for tensor in graph.graph.initializer if tensor.name.endswith(end))
        values = onnx.numpy_helper.to_array(matrix).copy()
        assert values.dtype == np.int8
        matrix.raw_data = np.roll(values, 1, axis=0).tobytes()
        onnx.save(graph, wrong / "model.onnx")
        refresh(wrong)
        with pytest.raises(UserError, match="wrongly on this machine"), open_model(wrong, **SIZES):
            pass


@pytest.mark.slow
def test_torch_with_one_wrong_weight_and_its_memory(verdicts: Path, torch_worker: Worker, tmp_path: Path) -> None:
    folder = packed(tmp_path)
    deployment = find_deployment(folder, "torch")
    with load(deployment, **SIZES):
        (path,) = verdicts.iterdir()
    deployment = in_torch(folder, torch_worker)
    # A remembered verdict is read, not made again.
    path.write_text(json.dumps({**json.loads(path.read_text()), "difference": 7.0}))
    with load(deployment, **SIZES):
        assert json.loads(path.read_text())["difference"] == 7.0
    # One that saw fewer tokens than there is room for now is not enough.
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokens": 5}))
    with load(deployment, **SIZES):
        assert json.loads(path.read_text())["tokens"] == TOKENS

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] *= -1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refresh(folder)
    with (
        pytest.raises(UserError, match=r"PyTorch computes .* wrongly on this machine"),
        load(in_torch(folder, torch_worker), **SIZES),
    ):
        pass
    with (
        pytest.raises(UserError, match="wrongly on this machine"),
        load(in_torch(folder, torch_worker), prompt_length=1, new_tokens=1, cores=1),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("values", [None, "int8", "int4"])
@pytest.mark.usefixtures("verdicts")
def test_packed_weights_with_one_wrong_column(torch_worker: Worker, tmp_path: Path, values: str | None) -> None:
    """In bfloat16, and of codes, whose activations are rounded to 8 bits: the limit is what this rounding makes."""
    model = random_model("llama", hidden_size=64, intermediate_size=96).to(torch.bfloat16)
    for parameter in model.parameters():  # as far from zero as a trained model's
        parameter.data *= 8 if parameter.dim() > 1 else 1
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    text = CalibrationOptions(data=str(tmp_path / "text.txt"), sequences=2, length=32)
    prune(
        str(tmp_path / "model"), tmp_path / "sparse", PruneOptions(0.5, "magnitude", calibration=text, quantize=values)
    )
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    test = export_checkpoint(tmp_path / "sparse", "vllm", right).self_test
    assert test is not None
    assert test.tolerance == tolerance("float32")
    assert 0 < load_known_answer(right, test).spread.mean() < 0.05
    for dtype in (None, "float32"):
        with load(in_torch(right, torch_worker), dtype=dtype, **SIZES):
            pass

    shutil.copytree(right, wrong)
    tensors, name = load_file(wrong / "model.safetensors"), "model.layers.0.mlp.gate_proj"
    entry = PackedConfig.from_dict(load_config(wrong).quantization_config).modules[name]
    weight = packing.from_tensors(name, entry, {path.removeprefix(f"{name}."): one for path, one in tensors.items()})
    dense = packing.unpack(weight) if values is None else quantized.unpack_codes(weight)
    dense[:, 5] = -dense[:, 5].clamp(-7, 7)
    again = packing.pack(dense, BITMASK)
    if values is not None:
        again = quantized.pack(dense, weight.scales, weight.bits, weight.group)
    tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in again.tensors().items()}
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    with (
        pytest.raises(UserError, match="wrongly on this machine"),
        load(in_torch(refresh(wrong), torch_worker), **SIZES),
    ):
        pass


@pytest.mark.slow
@pytest.mark.usefixtures("verdicts")
def test_artifact_of_an_earlier_version_is_told_once(
    torch_worker: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = refresh(packed(tmp_path), self_test=None)
    progress.show(True)
    try:
        for said in (True, False):
            with load(in_torch(folder, torch_worker), **SIZES):
                assert ("holds no known answer" in capsys.readouterr().err) == said
    finally:
        progress.show(False)


@pytest.mark.slow
@pytest.mark.usefixtures("verdicts")
def test_damaged_answer(torch_worker: Worker, tmp_path: Path) -> None:
    folder = packed(tmp_path)
    test = load_artifact(folder).self_test
    assert test is not None
    (folder / test.file).write_bytes(b"not an archive")
    with pytest.raises(UserError, match=r"known_answer.npz was changed since the export .*Copy the folder again"):
        find_deployment(folder, "torch")
    refresh(folder)
    with (
        pytest.raises(UserError, match=r"is missing or damaged .* Export the checkpoint again"),
        load(in_torch(folder, torch_worker), **SIZES),
    ):
        pass
    outside = in_torch(refresh(folder, self_test={**dataclasses.asdict(test), "file": "../x"}), torch_worker)
    with pytest.raises(UserError, match=r"List only files inside"), load(outside, **SIZES):
        pass


def test_comparison() -> None:
    random = np.random.default_rng(0)
    logits = random.standard_normal((6, 9)).astype(np.float32)
    answer = KnownAnswer(np.arange(6), np.arange(9), logits, np.zeros(6))
    assert largest_difference(answer, logits[:4]) == 0
    # Log-probabilities: another number for each row.
    assert largest_difference(answer, logits + random.standard_normal((6, 1)).astype(np.float32)) < 1e-6
    partly = logits.copy()
    partly[2, 5:] = -np.inf
    assert largest_difference(answer, partly) < 1e-6
    partly[2, 1] += 3
    assert largest_difference(answer, partly) > 0.5
    for bad in (np.nan, np.inf):
        broken = logits.copy()
        broken[1, 1] = bad
        assert not largest_difference(answer, broken) <= 0.15
    assert largest_difference(answer, np.full_like(logits, -np.inf)) == np.inf


def test_comparison_where_activations_are_rounded_to_levels() -> None:
    """Later tokens may be as far as right computations are from each other, the first one must be right."""
    random = np.random.default_rng(0)
    logits = random.standard_normal((40, 90)).astype(np.float32)
    spread = np.array([0.0, *[0.04] * 39])
    answer = KnownAnswer(np.arange(40), np.arange(90), logits, spread)
    noise = random.standard_normal(logits.shape).astype(np.float32)

    def passes(found: np.ndarray) -> bool:
        difference, allowed = distance(answer, found, tolerance("float32"))
        return difference <= allowed

    assert passes(logits + spread[:, None] * noise)
    assert not passes(logits + 2 * spread[:, None] * noise)
    assert not passes(logits + 0.02 * noise)
    assert passes((logits + spread[:, None] * noise)[:3])
    assert not passes((logits + 0.02 * noise)[:3])
    broken = logits.copy()
    broken[30, 1] = np.nan
    assert not passes(broken)


def test_tokens_that_a_model_rules_out() -> None:
    """They have the type's lowest number as their logit, which no difference may be measured by."""
    logits = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    logits[:, 4] = np.finfo(np.float32).min
    answer = KnownAnswer(np.arange(6), np.arange(9), logits, np.zeros(6))
    assert largest_difference(answer, logits) == 0
    partly = logits.copy()
    partly[2, 1] += 3
    assert largest_difference(answer, partly) > 0.5
    partly = logits.copy()
    partly[2, 4] = 0
    assert largest_difference(answer, partly) == np.inf
    reference = Reference(np.arange(6)[None], np.arange(6), logits[None])
    assert compare_logits(logits[None], reference).largest_logit < 5
    for at in (1, 4):
        wrong = logits[None].copy()
        wrong[0, 2, at] = 3
        with pytest.raises(UserError, match="does not compute what the model computes"):
            compare_logits(wrong, reference)


def test_large_vocabulary_keeps_a_part_with_its_end(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).standard_normal((3, 50_000)).astype(np.float32)
    test = save_known_answer(tmp_path, np.arange(3), logits, tolerance("float32"))
    answer = load_known_answer(tmp_path, test)
    assert (tmp_path / test.file).stat().st_size < 100_000
    assert set(range(50_000 - 64, 50_000)) < set(answer.columns.tolist())
    assert np.array_equal(answer.logits, logits[:, answer.columns])


@pytest.mark.parametrize(("prompt", "new"), [(1, 1), (5, 3), (5, 200), (64, 64), (70, 1), (71, 4), (1000, 1)])
def test_lengths_fit_what_was_loaded(prompt: int, new: int) -> None:
    fixed = _lengths(TOKENS, load_runtime("deepsparse"), prompt, new)
    assert 1 <= fixed[0] <= prompt
    assert fixed[1] <= new
    assert sum(fixed) <= TOKENS
    free = _lengths(TOKENS, load_runtime("torch"), prompt, new)
    assert sum(free) == min(TOKENS, prompt + new)


def test_tolerances_follow_the_type() -> None:
    assert tolerance("float32") < tolerance("float16") < tolerance("bfloat16")
    assert tolerance("float32", "w8a8") == tolerance("int8") > tolerance("float32")
    assert tolerance("bfloat16", "w4a16") == tolerance("bfloat16")
