"""How much faster decoding could be if memory traffic were all that counts."""

from __future__ import annotations

from sparsedeploy.artifacts.description import Artifact
from sparsedeploy.errors import UserError


def bytes_per_token(artifact: Artifact) -> int:
    """Bytes of weights that decoding one token must at least read, as counted by the export.

    Raises:
        UserError: an artifact of an earlier version, which does not say.
    """
    if artifact.bytes_per_token is None:
        raise UserError(
            f"the export of {artifact.source.name} for {artifact.target} does not say how many bytes a token reads",
            "Export the checkpoint again with sparsedeploy export.",
        )
    return artifact.bytes_per_token


def decode_limit(artifact: Artifact, baseline: Artifact) -> float:
    """The highest decode speedup over the baseline that memory traffic alone would allow."""
    return bytes_per_token(baseline) / bytes_per_token(artifact)
