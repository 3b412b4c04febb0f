"""One product in llama.cpp: packed weights against llama.cpp's own dense kernel on the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.runtimes.environments import Environment
from sparsedeploy.runtimes.worker import Worker

pytestmark = [pytest.mark.llamacpp, pytest.mark.slow, pytest.mark.xdist_group("llamacpp")]

F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30
# Of the largest output. float32 differs by the order of sums; ggml rounds the inputs of a BF16 product to bfloat16, our
# kernels only where that is faster; float16 weights meet float32 activations here and float16 ones there; quantised
# activations have scales of 32 bits here and of 16 there.
TOLERANCES = {F32: 1e-5, BF16: 2**-8, F16: 1e-3, Q8_0: 1e-3, Q4_0: 1e-3}


def sparse(rows: int, columns: int, zeros: float, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    weights = random.standard_normal((rows, columns)).astype(np.float32)
    weights[random.random((rows, columns)) < zeros] = 0
    return weights


def to_blocks(weights: np.ndarray, kind: int) -> np.ndarray:
    """The bytes of a GGUF tensor, as ggml quantises it: scales in float16, blocks of 32."""
    if kind == F32:
        return weights
    if kind == F16:
        return weights.astype(np.float16)
    if kind == BF16:
        return (weights.view(np.uint32) >> 16).astype(np.uint16)
    blocks = weights.reshape(-1, 32)
    if kind == Q8_0:
        scales = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
        values = np.rint(blocks / np.where(scales == 0, 1, scales).astype(np.float32)).astype(np.int8)
        return np.concatenate([scales.view(np.uint8), values.view(np.uint8)], axis=1)
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    if kind == Q4_1:
        scales = ((high - low) / 15).astype(np.float16)
        codes = np.clip(np.rint((blocks - low) / np.where(scales == 0, 1, scales)), 0, 15).astype(np.uint8)
        head = [scales.view(np.uint8), low.astype(np.float16).view(np.uint8)]
    else:
        extreme = np.where(-low > high, low, high)
        scales = (extreme / -8).astype(np.float16)
        codes = np.clip(np.rint(blocks / np.where(scales == 0, 1, scales)) + 8, 0, 15).astype(np.uint8)
        head = [scales.view(np.uint8)]
    return np.concatenate([*head, codes[:, :16] | codes[:, 16:] << 4], axis=1)


class Products:
    def __init__(self, worker: Worker, folder: Path) -> None:
        self.worker, self.folder = worker, folder

    def __call__(
        self, kind: int, data: np.ndarray, rows: int, columns: int, x: np.ndarray, cores: int
    ) -> tuple[bool, np.ndarray, np.ndarray]:
        np.save(self.folder / "w.npy", np.ascontiguousarray(data).view(np.uint8))
        np.save(self.folder / "x.npy", x)
        files = {"weights": str(self.folder / "w.npy"), "x": str(self.folder / "x.npy")}
        sizes = {"kind": kind, "rows": rows, "columns": columns, "cores": cores}
        result = self.worker.call("product", **files, **sizes, folder=str(self.worker.folder))
        arrays = self.worker.arrays(result)
        return result["packed"], arrays["dense"], arrays["sparse"]


@pytest.fixture(scope="module", params=["graph", "device"])
def products(
    runtime: Environment, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Products]:
    """Both ways in which the backend computes: in the CPU backend's graph, and as a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEDEPLOY_LLAMACPP", request.param)
        patch.setenv("SPARSEDEPLOY_PACK", "always")
        with runtime.worker() as worker:
            yield Products(worker, tmp_path_factory.mktemp("products"))
        said = worker.log.read_text()
    assert ("in the CPU backend's graph" if request.param == "graph" else "as a device") in said


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 3, 33, 512])
@pytest.mark.parametrize("kind", list(TOLERANCES))
def test_packed_equals_dense(products: Products, kind: int, batch: int, cores: int) -> None:
    for rows, columns, zeros in ((96, 64, 0.5), (50, 160, 0.7), (16, 32, 1.0), (40, 96, 0.0)):
        weights = to_blocks(sparse(rows, columns, zeros), kind)
        x = np.random.default_rng(1).standard_normal((batch, columns)).astype(np.float32)
        packed, dense, found = products(kind, weights, rows, columns, x, cores)
        assert packed
        assert np.abs(dense - found).max() <= TOLERANCES[kind] * max(np.abs(dense).max(), 1e-6)


def test_q4_1_is_packed_only_where_it_has_an_exact_zero(products: Products) -> None:
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    # Codes 0 to 15 times 0.25 less 2: zero is code 8.
    codes = np.random.default_rng(0).integers(0, 16, (64, 32)).astype(np.uint8)
    codes[np.random.default_rng(1).random(codes.shape) < 0.6] = 8
    halves = np.array([0.25, -2.0], dtype=np.float16).view(np.uint8)
    exact = np.concatenate([np.tile(halves, (64, 1)), codes[:, :16] | codes[:, 16:] << 4], axis=1)
    packed, dense, found = products(Q4_1, exact, 32, 64, x, 1)
    assert packed
    assert np.abs(dense - found).max() <= 1e-3 * np.abs(dense).max()
    # Without a zero it stays dense and is still right.
    packed, dense, found = products(Q4_1, to_blocks(sparse(32, 64, 0.6), Q4_1), 32, 64, x, 1)
    assert not packed
    assert np.array_equal(dense, found)


def test_scale_that_is_no_number_stays_dense(products: Products) -> None:
    blocks = to_blocks(sparse(32, 64, 0.6), Q8_0)
    blocks[5, :2] = np.array([np.nan], dtype=np.float16).view(np.uint8)
    x = np.ones((1, 64), dtype=np.float32)
    packed, dense, found = products(Q8_0, blocks, 32, 64, x, 1)
    assert not packed
    assert np.array_equal(dense, found, equal_nan=True)
    assert "stays dense: a scale is NaN or infinite" in products.worker.log.read_text()


def test_dense_weights_have_no_masks(runtime: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are repacked into dense tiles or left to llama.cpp, as the measurement of the installation says."""
    monkeypatch.delenv("SPARSEDEPLOY_PACK", raising=False)
    monkeypatch.delenv("SPARSEDEPLOY_LLAMACPP", raising=False)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    with runtime.worker() as worker:
        products = Products(worker, tmp_path)
        for kind in (F16, Q8_0, Q4_0):
            _, dense, found = products(kind, to_blocks(sparse(64, 64, 0.01), kind), 64, 64, x, 2)
            assert np.abs(dense - found).max() <= TOLERANCES[kind] * np.abs(dense).max()
        assert "sparsedeploy: packed 0 tensors" in worker.log.read_text()
        assert "sparsedeploy: packed 1 tensors" not in worker.log.read_text()


def test_without_the_instructions_all_stays_dense(
    runtime: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPARSEDEPLOY_PACK", raising=False)
    monkeypatch.setenv("SPARSEDEPLOY_ISA", "portable")
    x = np.ones((1, 64), dtype=np.float32)
    with runtime.worker() as worker:
        packed, dense, found = Products(worker, tmp_path)(F32, sparse(64, 64, 0.9), 64, 64, x, 1)
        said = worker.log.read_text()
    assert not packed
    assert np.array_equal(dense, found)
    assert said.count("packed weights gain nothing on this processor (instructions: portable)") == 1


def test_file_that_is_no_model(runtime: Environment, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    sizes = {"cores": 1, "prompt_length": 4, "new_tokens": 1, "chunk": 4}
    with runtime.worker() as worker:
        with pytest.raises(UserError, match=r"llama.cpp cannot load"):
            worker.call("load", folder=str(tmp_path), **sizes)
        with pytest.raises(UserError, match=r"has no model.gguf"):
            worker.call("load", folder=str(tmp_path / "none"), **sizes)
