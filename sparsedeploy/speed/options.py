"""What is measured against what: the options of ``bench``, and their part in ``demo`` and ``deploy``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsedeploy.options import Options, like, option, seed_option
from sparsedeploy.runtimes.options import EngineOptions, InstallOptions, RuntimeOptions


@dataclass(frozen=True)
class BenchmarkOptions(RuntimeOptions):
    """Everything that decides a measurement but the folders that are compared with the baseline.

    Attributes:
        cores: numbers of threads; empty for all cores that this process may use.
        batches: numbers of copies of the prompt that are run at once, where a runtime can.
        chunk: prompt tokens that are run at once; None takes the prompt's length, at most 64.
        warmup_rounds: rounds that are run and not counted.
    """

    baseline: str = option("", "Folder of the dense model, or RUNTIME=FOLDER.", short="-b", reads=True)
    cores: tuple[int, ...] = option((), "Cores to use, such as 1,2.", unset="all", short="-c", at_least=1)
    prompt_lengths: tuple[int, ...] = option(
        (64,), "Tokens of the prompt, such as 128,512.", flag="--prompt-length", at_least=1
    )
    batches: tuple[int, ...] = option(
        (1,), "Sequences at once, such as 1,4, where a runtime supports it.", flag="--batch", at_least=1
    )
    decode_tokens: int = option(64, "Tokens to decode after the prompt.", at_least=1)
    rounds: int = option(10, "Rounds in which each folder is measured.", short="-r", at_least=1)
    warmup_rounds: int = option(2, "Warm-up rounds, not counted.", flag="--warmup", at_least=0)
    chunk: int | None = option(None, "Prompt tokens run at once.", unset="the whole prompt, at most 64", at_least=1)
    profile: bool = option(False, "Also show the time of each layer, where the engine reports it.")
    seed: int = seed_option("Seed of the random prompt.")


@dataclass(frozen=True)
class SpeedOptions(Options):
    """A benchmark with one setting of each kind: what ``demo`` and ``deploy`` measure.

    Attributes:
        python: what the runtime's environment is made from.
    """

    prompt_length: int = like(BenchmarkOptions, "prompt_lengths", 128, help="Tokens of the prompt.")
    decode_tokens: int = like(BenchmarkOptions, "decode_tokens", 32)
    rounds: int = like(BenchmarkOptions, "rounds")
    cores: int | None = like(EngineOptions, "cores")
    python: str | None = like(InstallOptions, "python")

    def against(self, baseline: str, *, profile: bool = False) -> BenchmarkOptions:
        """The benchmark against this dense model."""
        return BenchmarkOptions(
            baseline=baseline,
            cores=() if self.cores is None else (self.cores,),
            prompt_lengths=(self.prompt_length,),
            decode_tokens=self.decode_tokens,
            rounds=self.rounds,
            profile=profile,
        )


@dataclass(frozen=True)
class ResultOptions(Options):
    """In what other forms a result is written."""

    csv: Path | None = option(None, "File for the rows as CSV.", writes=True)
    html: Path | None = option(None, "File for a page with tables and plots.", writes=True)


@dataclass(frozen=True)
class CompareOptions(Options):
    """Which two results are compared."""

    compare: tuple[Path, Path] | None = option(None, "Measure nothing; compare two results, OLD NEW.")
    threshold: str = option("5%", "Growth that counts as a regression, such as 5% or 0.05.", only_with="compare")
