"""The cached reference model: trained once per content, whole or absent, safe with concurrent processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from sparsedeploy import progress
from sparsedeploy.folders import new_folder
from sparsedeploy.reference.corpus import Document, fingerprint, read_corpus
from sparsedeploy.reference.options import ReferenceOptions, content_key, preset_options
from sparsedeploy.resources import cache_folder, cache_home


def reference_model(preset: str = "default", seed: int = 0, *, refresh: bool = False) -> Path:
    """The folder of the reference model; trained now if this corpus and recipe have not been trained yet.

    Args:
        preset: ``default`` (minutes) or ``tiny`` (seconds, for tests).
        seed: of the initial weights and of the order of the data.
        refresh: train again and replace the cached folder.

    Raises:
        UserError: an unknown preset, no standard-library sources, or the cache folder cannot be written.
    """
    return cached_reference(preset_options(preset, seed), read_corpus(), refresh=refresh)


def cached_reference(options: ReferenceOptions, documents: Sequence[Document], *, refresh: bool = False) -> Path:
    """Like :func:`reference_model`, for any options and corpus."""
    folder = cache_home() / "reference" / f"{options.name}-{content_key(options, fingerprint(documents))}"
    if folder.is_dir() and not refresh:  # folders appear whole, so being there is being complete
        return folder
    cache_folder("reference")
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        progress.note("Another process is training the reference model; waiting for it.")
        lock.acquire()
    try:
        if not folder.is_dir() or refresh:
            from sparsedeploy.reference.train import train_reference  # torch and transformers only when needed

            progress.note(f"Training the '{options.name}' reference model (once; it is kept in {folder.parent}).")
            with new_folder(folder, overwrite=True) as staging:
                train_reference(options, documents, staging)
    finally:
        lock.release()
    return folder
