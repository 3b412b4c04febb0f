"""Take a Hugging Face causal LM, prune it, and ship it to a runtime that is measurably faster."""

from sparsedeploy.formats.register import register_with_transformers
from sparsedeploy.version import __version__

register_with_transformers()

__all__ = ["__version__"]
