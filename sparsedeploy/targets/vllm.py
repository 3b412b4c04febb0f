"""Export for vLLM: a Hugging Face folder whose sparse linears are packed, read by the ``sparsedeploy-vllm`` plugin.

transformers reads it too once ``sparsedeploy`` is imported. The weights keep their values: every packed tensor is
unpacked again and compared before it is written. Weights that pruning rounded are packed as their codes and scales.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sparsedeploy import progress
from sparsedeploy.artifacts.description import Artifact, Engine, SelfTest, Sparsity, config_shapes
from sparsedeploy.artifacts.folder import Checkpoint
from sparsedeploy.artifacts.known_answer import TOKENS, save_known_answer, tolerance
from sparsedeploy.artifacts.traffic import folder_bytes
from sparsedeploy.checkpoint.manifest import MANIFEST, load_manifest
from sparsedeploy.checkpoint.scales import FILE as SCALES
from sparsedeploy.checkpoint.scales import load_scales
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json
from sparsedeploy.formats import packed as packing
from sparsedeploy.formats import quantized
from sparsedeploy.formats.config import BITMASK, ModuleFormat, PackedConfig
from sparsedeploy.formats.packed import PackedWeight
from sparsedeploy.grid import Grid, codes_of
from sparsedeploy.models.loading import build_empty, load_model
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.models.tensor_files import TensorFiles, check_tensor
from sparsedeploy.models.weight_files import INDEX, note_left_out, small_files
from sparsedeploy.options import Options, option
from sparsedeploy.plan import NM
from sparsedeploy.reading import SOUND_COPY, read_object
from sparsedeploy.registry import TARGETS
from sparsedeploy.targets.base import ExportJob, describe
from sparsedeploy.targets.check import reference_logits
from sparsedeploy.targets.options import VllmScheme
from sparsedeploy.targets.quantize import export_quantized
from sparsedeploy.targets.spread import in_float32, rounded, save_measured, spread_of, to_groups, to_type

ENGINE = Engine(name="vllm", version="0.32.0")
# Copied are the small files of the model folder; weights in any format are written anew or left out.
_COPIED = (".json", ".txt", ".model", ".jinja", ".py")
_NOT_COPIED = ("config.json", INDEX, "artifact.json", "sparsity.json")


@dataclass(frozen=True)
class VllmOptions(Options):
    """How weights are packed or quantised."""

    format: Literal["auto", "bitmask"] = option(
        "auto",
        "`auto` takes for each module the format in which it is smallest (N:M where its weights follow one); "
        "`bitmask` takes only that.",
    )
    quantize: VllmScheme | None = option(
        None,
        "Instead of packing, quantise the pruned weights with llm-compressor, their zeros kept: `fp8-dynamic` (8-bit "
        "floats), `w8a8` (8-bit integers), both with activations quantised on the fly, or `w4a16` (4-bit integer "
        "weights). The options below belong to it.",
    )
    algorithm: Literal["round", "gptq"] = option(
        "round",
        "`round` to the nearest value, or `gptq`, which needs the calibration text. GPTQ moves errors on to later "
        "weights, and where those are pruned, the errors stay: at 70 % sparsity `round` was better, with 4 bits too.",
        only_with="quantize",
    )
    data: str | None = option(
        None,
        "Calibration text; None takes the one that the checkpoint's manifest names.",
        only_with="quantize",
        reads=True,
    )
    field: str | None = option(
        None,
        "Text column of JSONL rows and data sets; None takes the one that the manifest names.",
        only_with="quantize",
    )
    text: str | None = option(
        None,
        "Text for the perplexity before and after (its test split); None takes the calibration text.",
        only_with="quantize",
        reads=True,
    )
    windows: int = option(
        32,
        "Windows of it, each min(2048, the model's positions) long; 0 skips the perplexity.",
        at_least=0,
        only_with="quantize",
    )


@TARGETS.register("vllm", VllmOptions)
def export_vllm(job: ExportJob, options: VllmOptions) -> Artifact:
    """A folder with packed sparse weights for vLLM with the sparsedeploy-vllm plugin, and for transformers.

    Raises:
        UserError: not a causal LM, quantised or non-finite weights, no tokenizer, or nothing sparse enough to be
            worth packing.
    """
    if options.quantize is not None:
        return export_quantized(job, options, engine=ENGINE)
    opened = job.open()
    files = TensorFiles(opened.folder)
    inside, outside, kept = _linears(opened.folder, opened.config, job.trust_remote_code)
    module_of = {files.locate(f"{module}.weight").name: module for module in inside}
    with job.new_folder() as folder:
        packer = _Packer(options, set(module_of), _scales(opened, module_of))
        for shard in progress.track(files.shards, "pack weights"):
            packer.write_shard(shard, folder / shard.name)
        if not packer.packed and kept:
            raise UserError(
                f"the linears of {opened.folder} are parts of fused or transposed weights, such as {kept[0]}, which "
                "vLLM does not take packed",
                "Export a model whose layers are made of nn.Linear, or serve the checkpoint itself with vLLM.",
            )
        if not packer.packed:
            raise UserError(
                f"no linear of {opened.folder} is smaller packed than dense",
                "Prune the model first: sparsedeploy prune.",
            )
        left = sorted(set(module_of) - {f"{module}.weight" for module in packer.modules})
        ignored = [tensor.removesuffix(".weight") for tensor in left] + outside
        _write_configuration(opened.folder, folder, PackedConfig(packer.modules, tuple(ignored)).to_dict())
        if len(files.shards) > 1:
            metadata = {"total_size": packer.bytes}
            write_json(folder / INDEX, {"metadata": metadata, "weight_map": packer.weight_map})
        if opened.head_is_pruned:
            progress.note("the output head stays as it is, with its zeros: vLLM has no packed form of it")
        self_test = _known_answer(folder, opened, packer, inside)
        artifact = describe(
            folder,
            opened,
            target="vllm",
            dtype=packer.dtype,
            sparsity=Sparsity(weights=packer.weights, zeros=packer.zeros),
            engine=ENGINE,
            bytes_per_token=folder_bytes(folder, opened.config, trust_remote_code=job.trust_remote_code),
            self_test=self_test,
        )
    if kept:
        progress.note(
            f"{len(kept)} weights stay as they are, zeros included, as parts of fused or transposed ones: {kept[0]}"
        )
    progress.note(
        f"packed {packer.packed} linears: {packer.packed_bytes / 1e6:.1f} MB instead of "
        f"{packer.dense_bytes / 1e6:.1f} MB ({packer.packed_bytes / packer.dense_bytes:.3f} of dense)"
    )
    return artifact


def _known_answer(folder: Path, opened: Checkpoint, packer: _Packer, inside: list[str]) -> SelfTest:
    """Keep the answer in float32, and how far from it the model is in its own type, with the products of codes rounded.

    Args:
        inside: names of the linears inside the decoder layers.
    """
    dtype: torch.dtype = getattr(torch, packer.dtype)
    model = load_model(opened.folder, dtype=dtype, trust_remote_code=opened.trust_remote_code)
    positions = config_shapes(opened.config).max_positions
    with in_float32(model):
        reference = reference_logits(model, min(TOKENS, positions or TOKENS))
    if dtype == torch.float32 and not packer.scales:
        return save_known_answer(folder, *reference.answer, tolerance("float32"))
    rounding = to_groups if packer.scales else to_type(dtype)
    spread = spread_of(model, reference, rounded({model.get_submodule(name): rounding for name in inside}))
    return save_measured(folder, reference, spread, packer.dtype)


class _Packer:
    """Writes shards with the wanted tensors packed and counts what it did."""

    def __init__(
        self, options: VllmOptions, wanted: set[str], scales: tuple[Grid | None, dict[str, torch.Tensor]]
    ) -> None:
        self.options = options
        self.wanted = wanted
        self.grid, self.scales = scales
        self.modules: dict[str, ModuleFormat] = {}
        self.weight_map: dict[str, str] = {}
        self.dtype = "float32"
        self.packed = self.weights = self.zeros = self.bytes = self.packed_bytes = self.dense_bytes = 0

    def write_shard(self, source: Path, target: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(source, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                tensor = file.get_tensor(name)
                check_tensor(name, tensor)
                tensors.update(self._pack(name, tensor) if name in self.wanted else {name: tensor})
        self.weight_map.update(dict.fromkeys(tensors, target.name))
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        save_file(tensors, target, metadata={"format": "pt"})

    def _pack(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        module = name.removesuffix(".weight")
        self.weights += weight.numel()
        self.zeros += weight.numel() - int(weight.count_nonzero())
        self.dtype = str(weight.dtype).removeprefix("torch.")
        packed = self._packed(weight, self.scales.get(name))
        if packed is None:
            return {name: weight}
        packing.check(packed, module)
        if not torch.equal(packing.unpack(packed).to(weight.dtype), weight):
            raise UserError(f"{module} changed when it was packed and unpacked", "Report this as a bug.")
        self.modules[module] = packing.describe(packed)
        self._count(weight, packing.size(packed))
        return {f"{module}.{part}": tensor.contiguous() for part, tensor in packed.tensors().items()}

    def _packed(self, weight: torch.Tensor, scales: torch.Tensor | None) -> PackedWeight | None:
        """The packed weight, of codes where the checkpoint has scales; None where it would be no smaller."""
        if scales is None or self.grid is None:
            kind = packing.smallest_kind(weight)
            return None if kind is None else packing.pack(weight, kind if self.options.format == "auto" else BITMASK)
        codes = codes_of(weight, scales, self.grid)
        kind = packing.smallest_kind(codes) if self.options.format == "auto" else BITMASK
        pattern = None if kind in (None, BITMASK) else NM.parse(kind)
        return quantized.pack(codes, scales, self.grid.bits, self.grid.group, pattern)

    def _count(self, weight: torch.Tensor, packed_bytes: int) -> None:
        self.packed += 1
        self.packed_bytes += packed_bytes
        self.dense_bytes += weight.numel() * weight.element_size()


def _scales(opened: Checkpoint, module_of: Mapping[str, str]) -> tuple[Grid | None, dict[str, torch.Tensor]]:
    """What a pruned checkpoint's weights were rounded to, and the scales by the weights' names; none for any other."""
    if not (opened.folder / MANIFEST).exists():
        return None, {}
    manifest = load_manifest(opened.folder)
    grid = manifest.quantization
    if grid is None:
        return None, {}
    shapes = {target.name: (target.rows, target.columns) for target in manifest.plan.targets}
    scales = load_scales(opened.folder / SCALES, shapes, grid)
    return grid, {name: scales[module] for name, module in module_of.items() if module in scales}


def _linears(checkpoint: Path, config: Any, trust_remote_code: bool) -> tuple[list[str], list[str], list[str]]:
    """Names of the linears inside the decoder layers, of those outside (the output head), and of parts of weights."""
    model = build_empty(checkpoint, config, trust_remote_code=trust_remote_code)
    prunable = find_decoder_stack(model).all_linears()
    inside = [name for name, one in prunable.items() if isinstance(one, nn.Linear)]
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    known = set(inside)
    return inside, [name for name in every if name not in known], [name for name in prunable if name not in known]


def _write_configuration(checkpoint: Path, folder: Path, quantization: dict[str, Any]) -> None:
    """Copy the small files and write ``config.json`` with the ``quantization_config``."""
    note_left_out(checkpoint)
    for path in small_files(checkpoint):
        if path.suffix in _COPIED and path.name not in _NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
    config = read_object(checkpoint / "config.json", fix=SOUND_COPY)
    write_json(folder / "config.json", {**config, "quantization_config": quantization})
