"""How an engine is installed, started and asked: the options of ``runtime``, ``generate`` and ``serve``."""

from __future__ import annotations

from dataclasses import dataclass

from sparsedeploy.models.options import DTYPE_HELP, Dtype
from sparsedeploy.options import Options, option, seed_option
from sparsedeploy.runtimes.specification import runtime_names


@dataclass(frozen=True)
class RuntimeOptions(Options):
    """Where a model runs.

    Attributes:
        runtime: None for the one that runs the folder's export target.
        python: None for the managed environment.
    """

    runtime: str | None = option(
        None, "Engine to run on.", unset="the one that the folder was exported for", choices=runtime_names
    )
    python: str | None = option(None, "Python interpreter of your own environment with the runtime.", reads=True)
    dtype: Dtype = option("auto", f"With the torch runtime only. {DTYPE_HELP}")
    timeout: float = option(600.0, "Time limit in seconds for loading, and for each step after it.", above=0)

    @property
    def computes_in(self) -> str | None:
        """The name of the type to compute in; None leaves it to the runtime."""
        return None if self.dtype == "auto" else self.dtype


@dataclass(frozen=True)
class EngineOptions(RuntimeOptions):
    """How one engine is started."""

    cores: int | None = option(None, "Cores to use.", unset="all", short="-c", at_least=1)


@dataclass(frozen=True)
class InstallOptions(Options):
    """What a runtime's environment is made of."""

    python: str | None = option(
        None, "Python to make the runtime's environment from.", unset="one that fits", recorded=False, reads=True
    )
    extra: str | None = option(None, "What to add: server, for the web server of deepsparse.", flag="--with")


@dataclass(frozen=True)
class GenerateOptions(Options):
    """What text is generated."""

    max_new_tokens: int = option(64, "Maximum number of tokens to generate.", at_least=1)
    temperature: float = option(0.0, "Sampling temperature; 0 is greedy decoding.", at_least=0)
    seed: int = seed_option("Seed of the sampling.", only_with="temperature")


@dataclass(frozen=True)
class ServeOptions(Options):
    """Where a server listens, and for what lengths."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on.", at_least=0, at_most=65535)
    drain: float = option(30.0, "Seconds that running requests get to end when the server is stopped.", at_least=0)
    length: int = option(512, "Maximum number of tokens of a prompt and its answer together.", at_least=2)
    parallel: int | None = option(
        None,
        "Requests that are computed at once, each with room for --length tokens; more wait. Unset: by the engine, "
        "see `requests at once` in docs/runtimes.md.",
        at_least=1,
    )
