"""Make transformers read packed checkpoints, without importing it.

transformers has registries for quantisation methods but no entry point that fills them, so someone has to call them
after it is imported. Importing it here would cost every ``sparsedeploy`` command seconds. Instead, the method is added
right after the module that holds the registries has been imported.
"""

from __future__ import annotations

import importlib
import sys

from sparsedeploy.startup import after_import

_REGISTRIES = "transformers.quantizers.auto"
_METHOD = "sparsedeploy.formats.hf"


def register_with_transformers() -> None:
    """Register the packed format now if transformers' registries are loaded, else as soon as they are."""
    if _REGISTRIES in sys.modules:
        importlib.import_module(_METHOD)
    else:
        after_import(_REGISTRIES, lambda module: importlib.import_module(_METHOD))
