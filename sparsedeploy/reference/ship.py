"""Make the reference model that the package ships: train it, store it in bfloat16, record how good it is.

    python -m sparsedeploy.reference.ship

Run it in a checkout. A training that was stopped resumes. What it writes is `sparsedeploy/reference/model/`.
"""

from __future__ import annotations

import json
import math

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sparsedeploy import progress
from sparsedeploy.folders import new_folder, write_json
from sparsedeploy.reference.cache import SHIPPED, reference_model
from sparsedeploy.reference.corpus import read_corpus
from sparsedeploy.reference.tokenizer import save_tokenizer
from sparsedeploy.reference.train import mean_loss, validation_windows

COMMAND = "python -m sparsedeploy.reference.ship"


def main() -> None:
    progress.show()
    trained = reference_model("default", train=True)
    report = json.loads((trained / "reference.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(trained)
    model = LlamaForCausalLM.from_pretrained(trained).to(torch.bfloat16)
    with new_folder(SHIPPED, overwrite=True) as folder:
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        windows = validation_windows(tokenizer, read_corpus(), report["options"]["context"])
        loss = mean_loss(model.float(), windows)
        report["shipped"] = {
            "command": COMMAND,
            "dtype": "bfloat16",
            "validation_loss": loss,
            "validation_perplexity": math.exp(loss),
        }
        write_json(folder / "reference.json", report)
    progress.note(f"{SHIPPED}: perplexity {math.exp(loss):.3f} on held-out text")


if __name__ == "__main__":
    main()
