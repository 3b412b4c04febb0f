"""The embedded default: a small Llama-type model, trained from scratch on Python's own standard library."""

from sparsedeploy.reference.cache import reference_model
from sparsedeploy.reference.corpus import stdlib_documents

__all__ = ["reference_model", "stdlib_documents"]
