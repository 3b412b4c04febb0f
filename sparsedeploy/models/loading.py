"""Load a causal LM and its tokenizer from a local folder or a hub id."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.utils import logging

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.hub import hub_refusal, unreachable
from sparsedeploy.models.computing import attention, compute_type, mask_later_tokens
from sparsedeploy.models.config_check import check_sizes
from sparsedeploy.models.low_rank import FOLDER as ADAPTER
from sparsedeploy.models.low_rank import attach_low_rank, load_adapter
from sparsedeploy.models.options import LoadOptions
from sparsedeploy.models.stored_names import StoredNames
from sparsedeploy.models.tensor_files import TensorFiles, check_tensor
from sparsedeploy.paths import expand
from sparsedeploy.reading import SOUND_COPY, read_object

# The name of our own packed weights in a configuration, see sparsedeploy/formats/config.py.
PACKED = "sparsedeploy"
# Classes of transformers that answer with a label in place of a text.
_CLASSIFIER = re.compile(r"\w+For\w*(Classification|QuestionAnswering)")
# Of a repository on the hub: the model, what its tokenizer reads, and what says under which terms it may be used.
_FETCHED = [
    *("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"),
    *("README*.md", "LICEN?E*", "NOTICE*", "*.masks", "recipe.yaml"),
]


def resolve_model(source: str | Path) -> Path:
    """The local folder of a model: the folder itself, or the snapshot of a hub id (downloaded when needed).

    Raises:
        UserError: neither a folder nor a hub id that this machine may download.
    """
    folder = expand(source)
    if folder.is_dir():
        return folder
    text = str(source)
    if folder.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise UserError(f"no model folder at {text}", "Give a Hugging Face model folder or a hub id such as org/name.")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(text, allow_patterns=_FETCHED))
    except HFValidationError as error:
        raise UserError(
            f"'{text}' is neither a folder nor a name on a hub", "Give a Hugging Face model folder or a hub id."
        ) from error
    except Exception as error:
        private = "Check the name; for a private model run: hf auth login."
        known = {
            401: ("has no public model of this name", private),
            403: ("does not let this account read it", "Accept its terms on its page, then run: hf auth login."),
            404: ("has no model of this name", private),
        }
        refusal = hub_refusal(error, constants.ENDPOINT, known)
        if refusal is None:
            reason = " ".join(str(error).split())[:160]
            refusal = UserError(f"fetching it from the hub fails ({type(error).__name__}: {reason})", "Check the name.")
        fix = "Check the path; for a model on the hub, the network." if unreachable(error) else refusal.fix
        raise UserError(f"'{text}' is not a local folder, and {refusal.message}", fix) from error


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration.

    Raises:
        UserError: no or broken ``config.json``, a model type that transformers does not know, an encoder-decoder, a
            classifier, or weights that another tool has quantised.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} has no config.json", "Give a Hugging Face model folder or a hub id.")
    raw = read_object(path, fix=SOUND_COPY)
    check_sizes(raw, path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder} needs its own Python code to load",
                "If you trust its source, add --trust-remote-code.",
            ) from error
        if (lacking := _missing_package(error, raw.get("model_type"))) is not None:
            raise lacking from error
        if raw.get("model_type") in CONFIG_MAPPING:
            reason = " ".join(str(error).split())[:240]
            raise UserError(f"{path} is not a usable configuration ({reason})", SOUND_COPY) from error
        raise UserError(
            f"model type '{raw.get('model_type')}' in {folder} is unknown to this version of transformers",
            "Upgrade transformers, or use a supported causal LM such as Llama, Qwen, Mistral, OPT or Gemma.",
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{folder} is an encoder-decoder ({config.model_type})", "Use a decoder-only causal language model."
        )
    if (kind := _classifier(config)) is not None:
        raise UserError(
            f"{folder} is a classifier ({progress.printable(kind)}), not a language model",
            "Use the causal language model that it was made from.",
        )
    if not isinstance(config.get_text_config(), PretrainedConfig):
        raise UserError(f"{path}: 'text_config' has no place in a model of type {config.model_type}", SOUND_COPY)
    _check_generation(folder)
    config.return_dict = True
    if getattr(config, "quantization_config", None) is not None and quantization_of(folder, raw) is None:
        del config.quantization_config
    return config


def _check_generation(folder: Path) -> None:
    """Refuse a ``generation_config.json`` that transformers would stop at while it loads the model."""
    path, fix = folder / "generation_config.json", "Get an intact copy of the file, or remove it."
    if path.exists():
        read_object(path, fix=fix)
        try:
            GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:
            raise UserError(f"{path} cannot be used ({' '.join(str(error).split())[:200]})", fix) from error


def _classifier(config: Any) -> str | None:
    """What a model is that answers with a label; None for any other."""
    named = getattr(config, "architectures", None)
    found = [name for name in (named if isinstance(named, list) else ()) if _CLASSIFIER.fullmatch(str(name))]
    if found:
        return str(found[0])
    # Of ShieldGemma 2 transformers also knows a language model, which cannot load its weights.
    both = all(type(config) in kind._model_mapping for kind in (AutoModelForImageClassification, auto_class(config)))
    return str(config.model_type) if both else None


def _missing_package(error: Exception, kind: object) -> UserError | None:
    """The refusal of a model whose parts are built by a package that is not installed."""
    found = re.search(r"requires the (\S+) library", str(error)) if isinstance(error, ImportError) else None
    if found is None:
        return None
    # What a package is called in an import and on an index may differ: PIL is installed as pillow.
    command = re.search(r"`(pip install [^`]+)`", str(error))
    return UserError(
        f"a {kind} model is built with the package {found[1]}, which is not installed",
        " ".join(command[1].split()) if command else f"pip install {found[1]}",
    )


def _check_class(folder: Path, config: Any) -> None:
    """Refuse what transformers has no language model for, and what is several models in one.

    The latter are run in turn by their ``generate``, such as the thinker and the talker of Qwen2.5-Omni.

    Raises:
        UserError: of several models naming the one that reads text, and how to save it alone.
    """
    kind = auto_class(config)
    if type(config) not in kind._model_mapping:
        if getattr(config, "auto_map", None):
            return  # a class of the model's own code
        raise UserError(
            f"{folder} is a model of type {config.model_type}, for which transformers has no causal language model",
            "Use a decoder-only language model such as Llama, Qwen, Mistral, OPT or Gemma.",
        )
    built = kind._model_mapping[type(config)]
    if isinstance(built, tuple) or built.forward is not nn.Module.forward:
        return
    with init_empty_weights():
        parts = kind.from_config(config).named_children()
    part = next(name for name, module in parts if type(module).forward is not nn.Module.forward)
    raise UserError(
        f"{folder} is several models ({built.__name__}), of which {part} is the language model",
        f"Save that one alone, and copy the tokenizer files to it: python -c 'import sys; from transformers import "
        f"{built.__name__} as M; M.from_pretrained(sys.argv[1]).{part}.save_pretrained(sys.argv[2])' OLD NEW",
    )


def quantization_of(folder: Path, raw: Mapping[str, Any]) -> str | None:
    """How a folder's tensors are quantised or packed, by its ``config.json``; None where they are not.

    What is said there of tensors that are plain is left over from another copy of the model, or asks transformers to
    quantise while it loads; it is not followed, and said so.

    Raises:
        UserError: tensors that are quantised by another tool.
    """
    said = raw.get("quantization_config")
    if said is None:
        return None
    method = progress.printable(str(said.get("quant_method") if isinstance(said, Mapping) else said))
    found = next((name for name, one in TensorFiles(folder).items() if one.is_quantised), None)
    if found is None:
        progress.note(f"config.json says that the weights are quantised ({method}), and they are not")
        return None
    if method != PACKED:
        raise UserError(
            f"{folder} is quantised ({method}: {progress.printable(found)})", "Use the model before quantisation."
        )
    return method


def auto_class(config: Any) -> Any:
    """The class of transformers' that builds and loads the model of a configuration.

    Of a model that also sees or hears, transformers may know a causal LM of its text part alone and the whole one; the
    checkpoint's ``architectures`` says which it is.
    """
    import transformers

    # Newer versions list those that hear, too.
    seeing = getattr(transformers, "AutoModelForMultimodalLM", AutoModelForImageTextToText)
    known = [kind for kind in (AutoModelForCausalLM, seeing) if type(config) in kind._model_mapping]
    for kind in known:
        built = kind._model_mapping[type(config)]
        names = {each.__name__ for each in (built if isinstance(built, tuple) else (built,))}
        if names & set(getattr(config, "architectures", None) or ()):
            return kind
    return known[0] if known else AutoModelForCausalLM


def build_empty(folder: Path, config: Any, *, dtype: torch.dtype | None = None, trust_remote_code: bool) -> nn.Module:
    """The model of a configuration without weights, in evaluation mode and without gradients.

    Raises:
        UserError: not a causal LM, or values that no model can be built from.
    """
    _check_class(folder, config)
    try:
        with init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(
                config, dtype=dtype, attn_implementation=attention(config), trust_remote_code=trust_remote_code
            )
    except Exception as error:
        if (lacking := _missing_package(error, config.model_type)) is not None:
            raise lacking from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{folder} is not a causal LM that can be built from its config.json ({reason})",
            "Use a decoder-only language model with a valid configuration.",
        ) from error
    mask_later_tokens(model)
    return model.requires_grad_(False).eval()


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a causal LM in evaluation mode, without gradients; low-rank factors beside it are attached.

    Args:
        dtype: to compute in; None takes the checkpoint's own, or float32 where the processor is bad at that.

    Raises:
        UserError: see :func:`load_config`; also missing or broken weights.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    dtype = compute_type(config, device, dtype)
    _check_class(folder, config)
    files = TensorFiles(folder)  # refuses what is not the model, or is corrupt
    if getattr(config, "quantization_config", None) is None:
        # A copy: building changes the type that a configuration names.
        empty = build_empty(folder, copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code)
        StoredNames(empty, files).note_left_over()
    try:
        with no_foreign_bars():
            model, report = auto_class(config).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attention(config),
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                use_safetensors=True,
            )
    except UserError:  # of our own loader of packed weights
        raise
    except SafetensorError as error:
        raise UserError(f"a weight file of {folder} is truncated or corrupt ({error})", "Download it again.") from error
    except Exception as error:
        if (lacking := _missing_package(error, config.model_type)) is not None:
            raise lacking from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
        raise UserError(
            f"{folder} does not load as a causal LM ({reason})",
            "Check that its config.json and weights belong together.",
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"{folder} lacks the weight {missing[0]} ({len(missing)} missing)", "Download the model again.")
    mask_later_tokens(model)
    if (folder / ADAPTER).is_dir():
        attach_low_rank(model, load_adapter(folder / ADAPTER))
    for name, tensor in {t.data_ptr(): (name, t) for name, t in model.state_dict().items()}.values():
        check_tensor(name, tensor)
    model.requires_grad_(False)
    return model.eval().to(device)


def load_asked(folder: Path, load: LoadOptions) -> nn.Module:
    """:func:`load_model` as the user asked for it."""
    return load_model(
        folder, dtype=load.torch_dtype, device=load.torch_device, trust_remote_code=load.trust_remote_code
    )


def exact_matmul() -> None:
    """Turn TF32 off: statistics and solves need full fp32 products (Hessians lose rank in TF32)."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")


@contextmanager
def no_foreign_bars() -> Iterator[None]:
    """Keep transformers' own progress bar off standard error: ours tell what is going on."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
