"""What every export target is given, and the description that it leaves beside what it wrote."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsedeploy.artifacts.description import Artifact, config_shapes, hash_files, write_artifact
from sparsedeploy.artifacts.folder import Checkpoint, open_checkpoint
from sparsedeploy.folders import new_folder


@dataclass(frozen=True)
class ExportJob:
    """What every target is given beside its own options.

    Attributes:
        checkpoint: a Hugging Face model folder, dense or pruned, or a hub id.
        output: the folder to create; it is known that it can be written.
    """

    checkpoint: str | Path
    output: Path
    trust_remote_code: bool = False
    overwrite: bool = False

    def open(self, *, adapters: bool = False) -> Checkpoint:
        """The checkpoint, checked; see :func:`~sparsedeploy.artifacts.folder.open_checkpoint`."""
        return open_checkpoint(self.checkpoint, adapters=adapters, trust_remote_code=self.trust_remote_code)

    def new_folder(self) -> AbstractContextManager[Path]:
        """The folder in the making."""
        return new_folder(self.output, overwrite=self.overwrite)


def describe(folder: Path, opened: Checkpoint, **facts: Any) -> Artifact:
    """Hash the files of an exported folder and write its description.

    Args:
        facts: of the :class:`Artifact`, besides what is known of the checkpoint; ``shapes`` and ``opset`` may be left
            out.
    """
    artifact = Artifact(
        source=opened.source,
        model_type=opened.config.model_type,
        files=hash_files(folder),
        **{"shapes": config_shapes(opened.config), "opset": None, **facts},
    )
    write_artifact(folder, artifact)
    return artifact
