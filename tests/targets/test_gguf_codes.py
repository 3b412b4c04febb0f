"""Codes in a GGUF file, read back by the gguf package."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsedeploy.errors import UserError
from sparsedeploy.grid import Grid
from sparsedeploy.targets import llamacpp
from sparsedeploy.targets.gguf_codes import TYPES, layouts, place_codes
from tests.scripts import load_script

gguf = pytest.importorskip("gguf")


def write(path: Path, tensors: dict[str, np.ndarray], kind: str | None) -> None:  # type: ignore[type-arg]
    writer = gguf.GGUFWriter(path, "llama")
    for name, values in tensors.items():
        if kind is None:
            writer.add_tensor(name, values)
        else:
            quantization = gguf.GGMLQuantizationType[kind]
            data = gguf.quants.quantize(values, quantization)
            writer.add_tensor(name, data, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_found_again_after_renaming_and_reordering(tmp_path: Path, bits: int, stored: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(bits)
    grid = Grid(bits)
    low, high = grid.ends
    weights, scales, exact = {}, {}, {}
    for name, rows in (("q", 6), ("up", 9)):
        codes = torch.randint(low, high + 1, (rows, 64), generator=generator)
        codes[torch.rand(rows, 64, generator=generator) < 0.5] = 0
        scales[name] = (torch.rand(rows, 2, generator=generator) - 0.5).half() / 16
        spread = scales[name].float().repeat_interleave(32, dim=1)
        weights[name] = (codes * spread).to(stored)
        exact[name] = (codes * spread).numpy()
    order = torch.randperm(6, generator=generator)
    in_file = {
        "blk.0.attn_q.weight": weights["q"][order].float().numpy(),
        "blk.0.ffn_up.weight": weights["up"].float().numpy(),
        "output.weight": np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32),
    }
    write(tmp_path / "exact.gguf", in_file, None)
    write(tmp_path / "final.gguf", in_file, TYPES[bits])
    files = [str(tmp_path / name) for name in ("exact.gguf", "final.gguf")]
    before, after = map(layouts, load_script("export/llamacpp/gguf_tool.py").layout(tmp_path, *files))
    untouched = gguf.GGUFReader(tmp_path / "final.gguf").tensors[2].data.copy()
    written = place_codes(tmp_path / "exact.gguf", tmp_path / "final.gguf", before, after, weights, scales, grid)
    assert written == 2
    found = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(tmp_path / "final.gguf").tensors
    }
    assert np.array_equal(found["blk.0.attn_q.weight"], exact["q"][order.numpy()])
    assert np.array_equal(found["blk.0.ffn_up.weight"], exact["up"])
    assert np.array_equal(gguf.GGUFReader(tmp_path / "final.gguf").tensors[2].data, untouched)


def test_a_bare_assertion_of_the_converter_is_one_line_with_its_place(tmp_path: Path) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys\nassert len(sys.argv) == 2")
    problem = "llama.cpp cannot convert M, whose architecture is NewForCausalLM"
    with pytest.raises(UserError) as caught:
        llamacpp._run([sys.executable, str(script)], 60, problem)
    where = "AssertionError in convert_hf_to_gguf.py, line 2"
    assert str(caught.value) == (
        f"{problem}: a check of its own failed ({where}). Use a model and a tokenizer that llama.cpp supports."
    )
