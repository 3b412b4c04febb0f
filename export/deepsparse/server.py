"""``deepsparse.server`` on a copy of the folder: the engine writes the sizes into its graph."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
import server_arguments


def main() -> None:
    """Copy the folder, write the server's configuration, and run it."""
    asked, more = server_arguments.parse()
    copy = asked.scratch / server_arguments.MODEL
    shutil.copytree(asked.folder, copy)
    settings = copy / "tokenizer_config.json"
    if settings.is_file():
        values = json.loads(settings.read_text(encoding="utf-8"))
        if values.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name, unknown to transformers 4
            settings.write_text(json.dumps({**values, "tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
    endpoint = {
        "name": server_arguments.MODEL,
        "task": "text_generation",
        "model": str(copy),
        "kwargs": {"sequence_length": asked.length, "prompt_sequence_length": asked.chunk},
    }
    config = asked.scratch / "server.yaml"  # JSON is YAML too
    config.write_text(json.dumps({"num_cores": asked.cores, "num_workers": 1, "endpoints": [endpoint]}))
    from deepsparse.server.cli import main as run

    sys.argv[1:] = ["--config_file", str(config), "--host", asked.host, "--port", str(asked.port), *more]
    run()


if __name__ == "__main__":
    main()
