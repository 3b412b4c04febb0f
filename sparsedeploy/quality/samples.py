"""What a deployed model writes: a few prompts continued greedily, token by token."""

from __future__ import annotations

from typing import Any

from sparsedeploy.runtimes.engine import Deployment, load
from sparsedeploy.runtimes.text import TextTools

PROMPT_TOKENS, NEW_TOKENS = 24, 32


def sample_generations(
    deployment: Deployment, tokenizer: Any, prompts: list[list[int]], *, cores: int | None = None
) -> list[dict[str, Any]]:
    """Continue prompts of one length in the engine.

    Args:
        tokenizer: of the model.
        prompts: tokens.

    Returns:
        For each prompt its text and the text of each new token; what completes no character yet is empty.

    Raises:
        UserError: the runtime fails.
    """
    samples = []
    length = max(map(len, prompts))
    with load(deployment, prompt_length=length, new_tokens=NEW_TOKENS, cores=cores) as model:
        for prompt in prompts:
            text = TextTools(tokenizer, [], len(tokenizer))
            made: list[int] = []
            pieces = []
            for token in model.generate(prompt, NEW_TOKENS, 0.0, 0, []):
                made.append(token)
                pieces.append(text.next_piece(made))
            if pieces:
                pieces[-1] += text.last_piece(made)
            samples.append({"prompt": text.decode(prompt), "tokens": pieces})
    return samples


def prompts_of(windows: Any) -> list[list[int]]:
    """The beginnings of the first and the last window, ``windows`` int64 ``[count, context]``."""
    length = min(PROMPT_TOKENS, windows.shape[1] // 2)
    ends = {0, len(windows) - 1}
    return [windows[at, :length].tolist() for at in sorted(ends)]
