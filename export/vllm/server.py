"""``vllm serve`` on the first cores that this process may use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
import server_arguments


def main() -> None:
    """Become the server."""
    asked, more = server_arguments.parse()
    cores = sorted(os.sched_getaffinity(0))[: asked.cores]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    program = Path(sys.executable).parent / "vllm"
    options = ["--host", asked.host, "--port", str(asked.port), "--max-model-len", str(asked.length)]
    options += ["--max-num-seqs", str(asked.parallel)]
    options += ["--served-model-name", server_arguments.MODEL]
    os.execv(program, [str(program), "serve", str(asked.folder), *options, *more])


if __name__ == "__main__":
    main()
