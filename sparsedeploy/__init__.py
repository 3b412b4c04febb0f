"""Take a Hugging Face causal LM, make it sparse, and ship it to a runtime that runs faster for it - with proof."""

from sparsedeploy.version import __version__

__all__ = ["__version__"]
