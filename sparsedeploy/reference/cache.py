"""The reference model: the shipped one, or one that is trained once per content and kept in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from sparsedeploy import progress
from sparsedeploy.folders import new_folder
from sparsedeploy.reference.corpus import Document, fingerprint, read_corpus
from sparsedeploy.reference.options import PRESETS, ReferenceOptions, content_key, preset_options
from sparsedeploy.resources import cache_folder, cache_home

# The default preset with seed 0, made by sparsedeploy.reference.ship.
SHIPPED = Path(__file__).parent / "model"


def reference_model(preset: str = "default", seed: int = 0, *, train: bool = False) -> Path:
    """The folder of a reference model: the shipped one, or one that is trained now if it has not been yet.

    Args:
        preset: ``default`` (shipped; to train it takes minutes) or ``tiny`` (seconds, for tests).
        seed: of the initial weights and of the order of the data; another than 0 is always trained.
        train: train it here, on this Python's standard library, in place of the shipped one.

    Raises:
        UserError: an unknown preset, no standard-library sources, or the cache folder cannot be written.
    """
    options = preset_options(preset, seed)
    if options == PRESETS["default"] and not train:
        return SHIPPED
    return cached_reference(options, read_corpus())


def cached_reference(options: ReferenceOptions, documents: Sequence[Document], *, refresh: bool = False) -> Path:
    """The trained model of any options and corpus.

    Args:
        refresh: train again and replace the cached folder.
    """
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
                # A killed training leaves this file, and the next one resumes from it.
                train_reference(options, documents, staging, folder.with_name(f"{folder.name}.training"))
    finally:
        lock.release()
    return folder
