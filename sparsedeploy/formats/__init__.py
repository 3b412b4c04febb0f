"""Packed sparse weights: the non-zero values and where they stand. ``docs/format.md`` is the specification.

``bitmask`` (one bit a weight) and ``nm`` (N of every M) hold pure functions, ``packed`` calls the right ones,
``config`` is the ``quantization_config`` of a checkpoint and ``hf`` lets transformers read one.
"""
