"""What is measured against what: the options of ``bench``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsedeploy.options import Options, option, seed_option
from sparsedeploy.runtimes.options import RuntimeOptions


@dataclass(frozen=True)
class BenchmarkOptions(RuntimeOptions):
    """Everything that decides a measurement but the folders that are compared with the baseline.

    Attributes:
        cores: numbers of threads; empty for all cores that this process may use.
        batches: numbers of copies of the prompt that are run at once, where a runtime can.
        chunk: prompt tokens that are run at once; None takes the prompt's length, at most 64.
        warmup_rounds: rounds that are run and not counted.
    """

    baseline: str = option("", "Folder of the dense model, or RUNTIME=FOLDER.", short="-b")
    cores: tuple[int, ...] = option((), "Cores to use, such as 1,2 [default: all].", short="-c", at_least=1)
    prompt_lengths: tuple[int, ...] = option(
        (64,), "Tokens of the prompt, such as 128,512.", flag="--prompt-length", at_least=1
    )
    batches: tuple[int, ...] = option(
        (1,), "Sequences at once, such as 1,4, where a runtime supports it.", flag="--batch", at_least=1
    )
    decode_tokens: int = option(64, "Tokens to decode after the prompt.", at_least=1)
    rounds: int = option(10, "Rounds in which each folder is measured.", short="-r", at_least=1)
    warmup_rounds: int = option(2, "Warm-up rounds, not counted.", flag="--warmup", at_least=0)
    chunk: int | None = option(None, "Prompt tokens run at once [default: the whole prompt, at most 64].", at_least=1)
    profile: bool = option(False, "Also show the time of each layer, where the engine reports it.")
    seed: int = seed_option("Seed of the random prompt.")


@dataclass(frozen=True)
class CompareOptions(Options):
    """Which two results are compared."""

    compare: tuple[Path, Path] | None = option(None, "Measure nothing; compare two results, OLD NEW.")
    threshold: str = option("5%", "Growth that counts as a regression, such as 5% or 0.05.", only_with="compare")
