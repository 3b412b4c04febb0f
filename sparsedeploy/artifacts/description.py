"""``artifact.json``: what an exported folder holds, where it came from and which engine it was written for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsedeploy.artifacts.integrity import verify_files
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json
from sparsedeploy.models.config_check import positions
from sparsedeploy.models.fingerprint import file_sha256
from sparsedeploy.reading import HASH, Fields, hashed, read_object, take_hash
from sparsedeploy.version import __version__

ARTIFACT_FILE = "artifact.json"
FORMAT = 1


@dataclass(frozen=True)
class Source:
    """The checkpoint that was exported: its folder's name and :func:`~sparsedeploy.models.fingerprint.model_sha256`."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Shapes:
    """Sizes that a runtime needs to feed the model. ``max_positions`` is in tokens, None where there is no limit."""

    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    max_positions: int | None


@dataclass(frozen=True)
class Sparsity:
    """Zeros among the prunable weights (the linears of the decoder layers), as counted in the exported weights."""

    weights: int
    zeros: int

    @property
    def fraction(self) -> float:
        return self.zeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Engine:
    """The runtime and the version of it that the artifact was written for."""

    name: str
    version: str


@dataclass(frozen=True)
class Check:
    """How far the exported model was from the checkpoint in the check after the export, in logits."""

    tokens: int
    largest_difference: float
    largest_logit: float


@dataclass(frozen=True)
class Quantization:
    """How the weights were quantised, and what became of the pruned ones and of the model.

    Attributes:
        scheme: such as ``w4a16``.
        algorithm: ``round`` or ``gptq``.
        group_size: weights that share a scale; None where a whole output row does.
        pruned: weights that the masks prune; ``revived`` of them are not zero any more.
        perplexity_before: of the pruned model, and ``perplexity_after`` of the quantised one, in torch on the same
            windows of ``text``; None when they were not taken.
    """

    scheme: str
    algorithm: str
    group_size: int | None
    pruned: int
    revived: int
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    text: str | None = None


@dataclass(frozen=True)
class SelfTest:
    """The answer that an engine must give on the machine that it runs on, see :mod:`.known_answer`.

    Attributes:
        file: beside the model, with its tokens and logits; its hash stands among the artifact's files.
        tolerance: the largest difference allowed, as a part of the largest logit.
    """

    file: str
    tokens: int
    tolerance: float


@dataclass(frozen=True)
class Artifact:
    """An exported folder, as its ``artifact.json`` describes it.

    Attributes:
        target: the export target, such as ``deepsparse``.
        model_type: the Hugging Face model type, such as ``llama``.
        dtype: of the weights and the cache, such as ``float32``.
        opset: the ONNX opset; None for a target without an ONNX graph.
        files: name -> SHA-256 of every other file of the folder.
        check: None when the check could not run.
        quantization: None when the weights keep their type.
        bytes_per_token: bytes of weights that decoding one token must at least read, see :mod:`.traffic`; None in an
            artifact of an earlier version.
        self_test: None in an artifact of an earlier version.
    """

    target: str
    source: Source
    model_type: str
    shapes: Shapes
    dtype: str
    opset: int | None
    files: dict[str, str]
    sparsity: Sparsity
    engine: Engine
    check: Check | None = None
    quantization: Quantization | None = None
    bytes_per_token: int | None = None
    self_test: SelfTest | None = None
    format: int = FORMAT
    sparsedeploy: str = __version__

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in the file."""
        first = {"format": self.format, "target": self.target}
        values = {**first, **dataclasses.asdict(self)}
        values["sparsity"]["fraction"] = self.sparsity.fraction
        return values


def config_shapes(config: Any) -> Shapes:
    """The sizes that a Hugging Face configuration gives.

    Raises:
        UserError: layers without attention heads, or of different sizes.
    """
    text = config.get_text_config(decoder=True)
    try:
        heads = text.num_attention_heads
        return Shapes(
            layers=text.num_hidden_layers,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            hidden=text.hidden_size,
            vocab=text.vocab_size,
            max_positions=positions(config),
        )
    except (AttributeError, TypeError, RuntimeError) as error:  # RuntimeError: a size that differs between layers
        raise UserError(
            f"the sizes of a {config.model_type} model are not those of one transformer "
            f"({' '.join(str(error).split())[:160]})",
            "Use a decoder-only transformer with equal layers, such as Llama, Qwen, Mistral, OPT or Gemma.",
        ) from error


def hash_files(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file of a folder except ``artifact.json``, sorted by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: file_sha256(path) for name, path in names.items() if name != ARTIFACT_FILE}


def write_artifact(folder: Path, artifact: Artifact) -> None:
    """Write ``artifact.json`` into the folder that it describes."""
    write_json(folder / ARTIFACT_FILE, hashed(artifact.to_json()))


def load_artifact(folder: Path, *, verify: bool = False) -> Artifact:
    """Read the description of an exported folder and make sure that its files are there and are those of the export.

    Args:
        verify: read every byte of them in any case; else only of those that have changed since they were last compared,
            see :mod:`.integrity`.

    Raises:
        UserError: no artifact, one of another format, a description that was edited, or a file that is missing or was
            changed.
    """
    path = Path(folder) / ARTIFACT_FILE
    again = "Export the checkpoint again with sparsedeploy export."
    if not path.exists():
        raise UserError(
            f"{folder} is not an exported artifact (it has no {ARTIFACT_FILE})",
            "Give a folder that sparsedeploy export wrote.",
        )
    values = read_object(path, fix=again)
    fields = Fields(values, str(path), again)
    if fields.integer("format") != FORMAT:
        raise UserError(
            f"{path} has format {fields.integer('format')}; this version of sparsedeploy reads format {FORMAT}", again
        )
    artifact = fields.build(Artifact)
    if HASH in values:  # an artifact of an earlier version has none
        take_hash(values, path, fix=again)
    if artifact.self_test is not None and not 0 <= artifact.self_test.tolerance <= 1:
        raise UserError(f"{path}: the self test's tolerance is {artifact.self_test.tolerance:g}, not 0 to 1", again)
    verify_files(Path(folder), artifact.files, path, again=verify)
    return artifact
