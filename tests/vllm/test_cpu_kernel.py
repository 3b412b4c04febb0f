"""The CPU kernel against a float64 product, for every instruction set that this processor has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sparsedeploy_vllm import compilation, cpu

from sparsedeploy.formats import bitmask, nm
from sparsedeploy.plan import NM
from tests.formats.test_packing import DTYPES, nm_weight, sparse_weight

FLAGS = cpu._processor_flags()
# Rounding of the result, as a share of the sum of absolute products.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20}

needs_compiler = pytest.mark.skipif(compilation.find_compiler() is None, reason="no C++ compiler: install g++")


def close(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether a product is as near to the float64 one as its dtype allows."""
    exact = x.double() @ weight.double().T
    scale = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, scale = exact + bias.double(), scale + bias.double().abs()
    return bool(((found.double() - exact).abs() <= TOLERANCE[found.dtype] * scale + 1e-30).all())


def weights(dtype: torch.dtype) -> list[torch.Tensor]:
    """Ragged rows, empty rows, rows without a zero, widths that are no multiple of a step, a last row at the end."""
    result = []
    for rows, columns in ((1, 1), (7, 37), (40, 256), (70, 1000), (5, 8)):
        for sparsity in (0.0, 0.5, 0.9, 1.0):
            weight = sparse_weight(rows, columns, sparsity, dtype)
            if rows > 2:
                weight[0] = 0
                weight[1] = 0.5
            result.append(weight)
    return result


@needs_compiler
@pytest.mark.parametrize("level", cpu.LEVELS, ids=lambda level: level.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level(level: object, dtype: torch.dtype) -> None:
    if not level.needs <= FLAGS:
        pytest.skip(f"this processor lacks {', '.join(sorted(level.needs - FLAGS))}")
    library = cpu.Library(cpu.find_or_compile(level), level)
    generator = torch.Generator().manual_seed(1)
    for weight in weights(dtype):
        packed = bitmask.pack(weight)
        out = torch.full_like(weight, 7)
        assert torch.equal(library.unpack(packed, out), weight)
        bias = torch.randn(weight.shape[0], generator=generator).to(dtype)
        for batch in (1, 2, 3, 7, 17):
            x = torch.randn(batch, weight.shape[1], generator=generator).to(dtype)
            assert close(library.linear(x, packed, None), x, weight)
            assert close(library.linear(x, packed, bias), x, weight, bias)


@needs_compiler
def test_strided_x_and_cut_weights() -> None:
    weight = sparse_weight(24, 128, 0.6, torch.float32)
    packed = bitmask.pack(weight)
    x = torch.randn(4, 256)[:, 64:192]
    assert close(cpu.linear(x, packed, None), x, weight)
    assert close(cpu.linear(x.T.contiguous().T, packed, None), x, weight)
    part = bitmask.cut_rows(packed, 8, 20)
    assert close(cpu.linear(x, part, None), x, weight[8:20])


@pytest.mark.parametrize("kernel", ["on", "off"])
def test_large_batches_and_no_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the largest batch, tiles are unpacked; without a compiler, torch unpacks them."""
    monkeypatch.setenv("SPARSEDEPLOY_CPU_KERNEL", kernel)
    monkeypatch.setattr(cpu, "_TILE_BYTES", 1000)
    cpu.load.cache_clear()
    try:
        assert kernel == "on" or cpu.load() is None
        for dtype in DTYPES:
            weight = sparse_weight(150, 72, 0.6, dtype)
            bias = torch.randn(150).to(dtype)
            for batch in (1, 40):
                x = torch.randn(batch, 72).to(dtype)
                assert close(cpu.linear(x, bitmask.pack(weight), bias), x, weight, bias)
    finally:
        cpu.load.cache_clear()


def test_without_a_compiler_the_fallback_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "cache_home", lambda: tmp_path)
    monkeypatch.setattr(cpu, "PREBUILT", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpu.load.cache_clear()
    try:
        assert cpu.load() is None
        assert "Install g++" in caplog.text
    finally:
        cpu.load.cache_clear()


def test_operators() -> None:
    """The torch operators: packed products, shapes under ``torch.compile``'s fake tensors, mismatches refused."""
    from sparsedeploy_vllm.product import packed_product, prepare

    weight = nm_weight(24, 64, NM(2, 8), torch.float32)
    x, bias = torch.randn(2, 3, 64), torch.randn(24)
    for packed in (bitmask.pack(weight), nm.pack(weight, NM(2, 8)), prepare(nm.pack(weight, NM(2, 8)))):
        found = packed_product(x, packed, bias)
        assert found.shape == (2, 3, 24)
        assert close(found.reshape(6, 24), x.reshape(6, 64), weight, bias)
        with pytest.raises(ValueError, match="does not fit"):
            packed_product(x[..., :32], packed)
    operators = torch.ops.sparsedeploy
    packed = bitmask.pack(weight)
    arguments = (x[0], packed.mask, packed.values, packed.offsets, bias)
    torch.library.opcheck(operators.bitmask_linear.default, arguments)
    two_eight = nm.pack(weight, NM(2, 8))
    torch.library.opcheck(operators.nm_linear.default, (x[0], two_eight.values, two_eight.positions, 2, 8, None))


def test_choice_measures_and_obeys(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsedeploy_vllm import choice

    from sparsedeploy.errors import UserError

    packed = bitmask.pack(sparse_weight(64, 64, 0.6, torch.float32))
    measured = choice.measure(packed)
    assert measured.packed_ms > 0
    assert measured.packed == (measured.dense_ms >= 0.9 * measured.packed_ms)
    monkeypatch.setattr(
        choice,
        "measure",
        lambda weight, dense, batch: choice.Choice(packed=batch == 1, packed_ms=2.0, dense_ms=1.0, batch=batch),
    )
    assert choice.choose(packed).packed
    monkeypatch.setenv("SPARSEDEPLOY_CPU_BATCH", "64")
    assert not choice.choose(packed).packed
    assert "dense 1.000 ms at batch 64" in choice.choose(packed).reason
    monkeypatch.setenv("SPARSEDEPLOY_CPU_BATCH", "many")
    with pytest.raises(UserError, match="'many'"):
        choice.choose(packed)
    monkeypatch.setenv("SPARSEDEPLOY_CPU", "packed")
    assert choice.choose(packed) == choice.Choice(packed=True)
    monkeypatch.setenv("SPARSEDEPLOY_CPU", "fast")
    with pytest.raises(UserError, match="'fast'"):
        choice.choose(packed)


def test_transformers_uses_the_kernels(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from sparsedeploy.formats import hf
    from sparsedeploy.targets.registry import export_checkpoint
    from tests.formats.test_transformers import PROMPT, logits, save_sparse_model

    dense = save_sparse_model(tmp_path / "dense", "llama", torch.float32)
    export_checkpoint(dense, "vllm", tmp_path / "packed")
    hf._kernels.cache_clear()
    assert hf._kernels() is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        found = model(PROMPT).logits
    assert torch.allclose(found, logits(dense), atol=1e-5)
