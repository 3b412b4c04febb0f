"""The job ``import``: an ordinary Hugging Face folder from a GGUF file, by transformers' own GGUF loader."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.folders import check_free_space, new_folder, write_json
from sparsedeploy.models.config_check import check_sizes
from sparsedeploy.models.fingerprint import file_sha256
from sparsedeploy.models.gguf_file import GGUFFile, read_gguf
from sparsedeploy.models.loading import build_empty, load_config
from sparsedeploy.models.stored_names import StoredNames
from sparsedeploy.models.tensor_files import TensorFiles, check_tensor
from sparsedeploy.models.tokenizer import load_tokenizer
from sparsedeploy.reference.tokenizer import save_for_every_version
from sparsedeploy.version import __version__
from sparsedeploy.workflows.options import ImportOptions

RECORD = "import.json"
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Tables that llama.cpp computes for itself from the configuration; the model has no such weights.
_ROPE_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_OTHER = "Take the model's Hugging Face folder instead."


def import_gguf(
    source: Path, output: Path, options: ImportOptions = ImportOptions(), *, overwrite: bool = False
) -> dict[str, Any]:
    """Write model and tokenizer of a GGUF file as a folder; returns what is recorded in it.

    Raises:
        UserError: a file that is damaged or that transformers cannot import, too little disk or memory, or an output
            that exists; nothing is left behind.
    """
    with new_folder(output, overwrite=overwrite) as staging:
        file = read_gguf(source)
        dtype = _dtype(file, options.dtype)
        needed = sum(tensor.elements for tensor in file.tensors) * dtype.itemsize
        check_free_space(staging, needed + (16 << 20))
        available = psutil.virtual_memory().available
        if needed > available:
            raise UserError(
                f"the weights take {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free",
                "Import on a larger machine" + ("." if dtype.itemsize == 2 else ", or with --dtype bfloat16."),
            )
        progress.note(f"dequantise {len(file.tensors)} tensors ({', '.join(file.types)}) to {_name(dtype)}")
        model = _load(file, dtype)
        _plain_model(model)
        with _silent():
            model.save_pretrained(staging)
        _save_tokenizer(file, staging)
        try:  # what every other command will read
            StoredNames(build_empty(staging, load_config(staging), trust_remote_code=False), TensorFiles(staging))
        except UserError as error:
            reason = error.message.replace(str(staging), "the folder made of it")
            raise UserError(f"{source} does not hold together: {reason}", _OTHER) from error
        load_tokenizer(staging)
        record = {
            "source": source.name,
            "sha256": file_sha256(source),
            "architecture": file.architecture,
            "types": file.types,
            "weights": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": _name(dtype),
            "sparsedeploy": __version__,
            "transformers": transformers.__version__,
        }
        write_json(staging / RECORD, record)
    return record


def _dtype(file: GGUFFile, asked: str) -> torch.dtype:
    if asked != "auto":
        chosen: torch.dtype = getattr(torch, asked)
        return chosen
    kinds = set(file.types)
    if not kinds <= set(_PLAIN):
        return torch.float32
    half = kinds - {"F32"}  # norms stay in float32 beside half-precision matrices
    return _PLAIN[half.pop()] if len(half) == 1 else torch.float32


def _load(file: GGUFFile, dtype: torch.dtype) -> Any:
    """The model in memory, with every tensor of the file in it."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.path.parent), "gguf_file": file.path.name}
    with _silent():
        try:
            config = AutoConfig.from_pretrained(**where, local_files_only=True)
        except Exception as error:
            raise UserError(
                f"transformers {transformers.__version__} cannot import a GGUF file of architecture "
                f"'{file.architecture}' ({_reason(error)})",
                _OTHER,
            ) from error
        if getattr(config, "is_encoder_decoder", False):
            raise UserError(f"{file.path} is an encoder-decoder", "Use a decoder-only causal language model.")
        check_sizes(config.to_dict(), file.path)
        _check_rope(file, config)
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                **where, dtype=dtype, output_loading_info=True, local_files_only=True
            )
        except Exception as error:
            raise UserError(f"transformers cannot import {file.path} ({_reason(error)})", _OTHER) from error
    if report["missing_keys"] or report.get("mismatched_keys"):
        names = sorted(map(str, report["missing_keys"] or report["mismatched_keys"]))
        raise UserError(f"{file.path} lacks the weight {names[0]} ({len(names)} missing)", _OTHER)
    stored = sum(tensor.elements for tensor in file.tensors if tensor.name not in _ROPE_TABLES)
    taken = sum(parameter.numel() for parameter in model.parameters())
    if stored > taken:
        raise UserError(
            f"transformers would take {taken:,} of the {stored:,} weights of {file.path}: the model would not be the "
            "same",
            _OTHER,
        )
    for name, tensor in model.state_dict().items():
        check_tensor(name, tensor)
    return model


def _check_rope(file: GGUFFile, config: Any) -> None:
    """Refuse positions that are scaled by a table in the file, which transformers does not read.

    Raises:
        UserError: such a table, where the configuration has no scaling of its own.
    """
    table = next((name for name in _ROPE_TABLES if file.tensor(name)), None)
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if table is not None and kind == "default":
        raise UserError(
            f"{file.path} scales its positions by {table}, which transformers does not import: long texts would come "
            "out wrong",
            _OTHER,
        )


def _plain_model(model: Any) -> None:
    """Take off the marks of a quantised model, which transformers refuses to save: the weights are plain now."""
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    if hasattr(model, "is_quantized"):
        model.is_quantized = False


def _save_tokenizer(file: GGUFFile, folder: Path) -> None:
    with _silent():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(file.path.parent), gguf_file=file.path.name, local_files_only=True
            )
        except Exception as error:
            raise UserError(
                f"transformers cannot import the tokenizer of {file.path} ({_reason(error)})", _OTHER
            ) from error
        tokenizer.save_pretrained(folder)
    save_for_every_version(folder)


@contextlib.contextmanager
def _silent() -> Any:
    """Keep transformers' bars and warnings about the file off the terminal: what matters is checked here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
