"""Take a Hugging Face causal LM, make it sparse, and ship it to a runtime that runs faster for it - with proof."""

from sparsedeploy.formats.register import register_with_transformers
from sparsedeploy.version import __version__

register_with_transformers()

__all__ = ["__version__"]
