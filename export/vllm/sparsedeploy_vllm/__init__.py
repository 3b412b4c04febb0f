"""Packed sparse weights in vLLM. vLLM calls :func:`register` through its entry point ``vllm.general_plugins``."""


def register() -> None:
    """Register the quantisation method ``sparsedeploy``; safe to call again."""
    import sparsedeploy_vllm.quantization  # noqa: F401 - importing it registers
