"""``llama-server`` with the backend for sparse weights, from the build that belongs to the environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
import server_arguments

BUILD = Path(sys.prefix).parent / "build"


def main() -> None:
    """Become the server."""
    asked, more = server_arguments.parse()
    backends = sorted(BUILD.glob("backend-*"))
    if not backends:
        sys.exit(f"there is no llama.cpp in {BUILD}: run sparsedeploy runtime install llamacpp")
    version = backends[-1].name.partition("-")[2]
    program = BUILD / f"llama.cpp-{version}" / "bin" / "llama-server"
    os.environ["GGML_BACKEND_PATH"] = str(backends[-1] / "libsparsedeploy-llamacpp.so")
    options = ["--model", str(asked.folder / "model.gguf"), "--host", asked.host, "--port", str(asked.port)]
    # The context is divided among the slots.
    context = asked.length * asked.parallel
    options += ["--ctx-size", str(context), "--parallel", str(asked.parallel), "--no-kv-unified"]
    options += ["--threads", str(asked.cores), "--alias", server_arguments.MODEL]
    # Verbose, so that the log says what was packed.
    options += ["--offline", "--no-webui", "--verbosity", "4"]
    os.execv(program, [str(program), *options, *more])


if __name__ == "__main__":
    main()
