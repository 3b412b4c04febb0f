"""How much faster decoding could be if memory traffic were all that counts.

Decoding one token at batch 1 reads each weight once. In a bitmask format a weight of ``b`` bits at sparsity ``s``
takes ``1 + b(1 - s)`` bits: one bit that says whether it is there, and the value if it is. Against dense weights that
is at most ``b / (1 + b(1 - s))`` times faster over the prunable weights. The weights that pruning leaves alone are
read densely in both; of them only the output matrix (vocabulary x hidden) is counted: norms and biases are small, and
of the embedding one row is read. The key/value cache and the activations are left out, so the true limit is a little
lower.
"""

from __future__ import annotations

from sparsedeploy.artifacts.description import Artifact
from sparsedeploy.errors import UserError

_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3fn": 8, "int8": 8}


def bitmask_bits(sparsity: float, bits: int) -> float:
    """Bits of one weight: ``1 + bits (1 - sparsity)``, or ``bits`` where dense storage is smaller."""
    return min(float(bits), 1 + bits * (1 - sparsity))


def bitmask_limit(sparsity: float, bits: int) -> float:
    """The highest speedup that memory traffic allows over prunable weights alone, against dense ones."""
    return bits / bitmask_bits(sparsity, bits)


def bytes_per_token(artifact: Artifact) -> float:
    """Bytes of weights that decoding one token must at least read, see the module's text.

    Raises:
        UserError: a dtype whose size is not known here.
    """
    if artifact.dtype not in _BITS:
        raise UserError(f"the size of dtype '{artifact.dtype}' is not known", f"Known: {', '.join(_BITS)}.")
    bits = _BITS[artifact.dtype]
    output_weights = artifact.shapes.vocab * artifact.shapes.hidden
    prunable = artifact.sparsity.weights * bitmask_bits(artifact.sparsity.fraction, bits)
    return (prunable + output_weights * bits) / 8


def decode_limit(artifact: Artifact, baseline: Artifact) -> float:
    """The highest decode speedup over the baseline that memory traffic alone would allow."""
    return bytes_per_token(baseline) / bytes_per_token(artifact)
