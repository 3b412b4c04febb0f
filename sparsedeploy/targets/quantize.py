"""``export --target vllm --quantize``: pruned weights quantised by llm-compressor with their zeros kept.

The result is a compressed-tensors checkpoint that vLLM loads without a plugin. It is read back and decompressed before
the folder appears; a pruned weight that is not zero there is an error.

vLLM 0.32 for CPUs runs all three schemes: w8a8 with its int8 kernel, w4a16 with its 4-bit kernel, which takes 16-bit
activations only (a float32 checkpoint is therefore stored in bfloat16), fp8-dynamic with torch's product, which is
right but no faster; fp8 pays on GPUs that compute in it (compute capability 8.9 or more).
"""

from __future__ import annotations

from typing import Protocol

import torch

from sparsedeploy import progress
from sparsedeploy.artifacts.companions import copy_companions
from sparsedeploy.artifacts.description import (
    Artifact,
    Engine,
    Quantization,
    Sparsity,
    config_shapes,
)
from sparsedeploy.artifacts.folder import Checkpoint
from sparsedeploy.artifacts.known_answer import TOKENS, save_known_answer, tolerance
from sparsedeploy.artifacts.traffic import folder_bytes
from sparsedeploy.calibration.samples import default_length
from sparsedeploy.calibration.text import recorded_tokens, text_of
from sparsedeploy.checkpoint import masks as mask_file
from sparsedeploy.checkpoint.manifest import RECIPE, Manifest, load_manifest
from sparsedeploy.errors import UserError
from sparsedeploy.models.tensor_files import TensorFiles
from sparsedeploy.plan import layer_number
from sparsedeploy.quality.perplexity import text_windows
from sparsedeploy.runtimes import llmcompressor
from sparsedeploy.targets.base import ExportJob, describe


class QuantizeOptions(Protocol):
    """The options of a target that a quantised export reads; see :class:`~sparsedeploy.targets.vllm.VllmOptions`."""

    @property
    def quantize(self) -> str | None: ...
    @property
    def algorithm(self) -> str: ...
    @property
    def data(self) -> str | None: ...
    @property
    def field(self) -> str | None: ...
    @property
    def text(self) -> str | None: ...
    @property
    def windows(self) -> int: ...


def export_quantized(job: ExportJob, options: QuantizeOptions, *, engine: Engine) -> Artifact:
    """A quantised checkpoint for vLLM in the compressed-tensors format, its pruned weights still zero.

    Args:
        options: of the target, with ``quantize`` set.
        engine: what the artifact is for.

    Raises:
        UserError: a folder without a plan, an adapter that is not merged, no environment, or a
            pruned weight that did not stay zero.
    """
    scheme = options.quantize
    assert scheme is not None
    if job.trust_remote_code:
        raise UserError("--quantize does not run a model's own code", "Leave --trust-remote-code out.")
    opened = job.open()
    manifest = load_manifest(opened.folder)
    where = llmcompressor.environment()
    plan = manifest.plan
    masks = mask_file.load_masks(opened.folder / mask_file.FILE, {t.name: t.columns for t in plan.targets})
    # A pruned output head is not quantised: it keeps its values.
    masks = {name: mask for name, mask in masks.items() if layer_number(name) is not None}
    stored = TensorFiles(opened.folder).locate(f"{plan.targets[0].name}.weight").dtype
    dtype = str(torch.bfloat16 if scheme == "w4a16" and stored == torch.float32 else stored).removeprefix("torch.")
    tokens = None
    if options.algorithm == "gptq":
        tokens = recorded_tokens(opened.tokenizer, opened.config, manifest, data=options.data, field=options.field)
    text, windows = _windows(opened, manifest, options)
    with job.new_folder() as folder:
        found = llmcompressor.quantize_folder(
            where,
            opened.folder,
            folder,
            scheme,
            options.algorithm,
            masks,
            tokens,
            windows,
            dtype=dtype,
            probe=_probe(opened),
        )
        if found["revived"]:
            raise UserError(
                f"{found['revived']:,} of {found['pruned']:,} pruned weights are not zero after quantisation",
                "Use --target-option algorithm=round, and report this as a bug.",
            )
        answer_tokens, answer_logits = found["answer"]
        self_test = save_known_answer(folder, answer_tokens, answer_logits, tolerance(dtype, scheme))
        # llm-compressor's record of its steps names a modifier that only our worker knows.
        (folder / RECIPE).unlink(missing_ok=True)
        copy_companions(opened.folder, folder, without=("config.json",))
        counted = {name: found[name] for name in ("group_size", "pruned", "revived")}
        measured = {name: found[name] for name in ("perplexity_before", "perplexity_after")}
        return describe(
            folder,
            opened,
            target="vllm",
            dtype=dtype,
            sparsity=Sparsity(weights=found["weights"], zeros=found["zeros"]),
            engine=engine,
            quantization=Quantization(scheme, options.algorithm, **counted, **measured, text=text),
            bytes_per_token=folder_bytes(folder, opened.config),
            self_test=self_test,
        )


def _probe(opened: Checkpoint) -> torch.Tensor:
    """Random tokens for the known answer, int64 [T]."""
    shapes = config_shapes(opened.config)
    length = min(TOKENS, shapes.max_positions or TOKENS)
    return torch.randint(0, shapes.vocab, (length,), generator=torch.Generator().manual_seed(1))


def _windows(
    opened: Checkpoint, manifest: Manifest, options: QuantizeOptions
) -> tuple[str | None, torch.Tensor | None]:
    """The name of the text for the perplexity and its windows; None and None where there is none."""
    text, field = text_of(manifest, options.text or options.data, options.field)
    if options.windows == 0 or text is None:
        return None, None
    try:
        length = default_length(opened.config)
        return text, text_windows(text, opened.tokenizer, length, field=field, limit=options.windows)
    except UserError as error:
        if options.text is not None:
            raise
        progress.note(f"no perplexity is taken: {error.message}; name a text with --target-option text=TEXT")
        return None, None
