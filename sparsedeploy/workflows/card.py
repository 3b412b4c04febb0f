"""The job ``card``: write the model card of a finished folder, with what was measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsedeploy.artifacts.description import ARTIFACT_FILE
from sparsedeploy.checkpoint.card import CARD, pruned_card, put_card
from sparsedeploy.checkpoint.evaluations import add_evaluations
from sparsedeploy.checkpoint.manifest import MANIFEST, load_manifest
from sparsedeploy.errors import UserError
from sparsedeploy.models.fingerprint import model_sha256


def write_card(folder: Path, evaluations: Sequence[Path] = (), *, overwrite: bool = False) -> Path:
    """Write a pruned checkpoint's README.md and return its path.

    Args:
        evaluations: results of ``eval``, of this folder's model or its base.
        overwrite: a card that is not ours may be replaced; it is kept under another name.

    Raises:
        UserError: not a folder of ``prune`` or ``recover``, results of another model, or a card that is not ours.
    """
    if not (folder / MANIFEST).is_file():
        exported = (folder / ARTIFACT_FILE).is_file()
        raise UserError(
            f"{folder} {'is an exported folder, whose card export wrote' if exported else f'has no {MANIFEST}'}",
            "Name a folder that prune or recover wrote"
            + (", then export it again: the results go along." if exported else "."),
        )
    manifest = load_manifest(folder)
    if evaluations:
        add_evaluations(folder, evaluations, model_sha256(folder), manifest.source.sha256)
    put_card(folder, pruned_card(folder, manifest), overwrite=overwrite)
    return folder / CARD
