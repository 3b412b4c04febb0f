"""Speed of pruned models with layers of a realistic width on the DeepSparse engine, against the dense one.

Makes a Llama of 4 layers (hidden 2048, intermediate 5504, 16 heads and 4 key/value heads, vocabulary 4096) with random
float32 weights, zeroes the smallest 50, 70 and 90 % of each row, exports all of them, checks the engine's logits
against torch, and measures prefill of 64 and 128 tokens and decode, on all cores and on one.

    python benchmarks/wide_model.py [--work FOLDER] [--rounds 15] [--cores 2 1] [--prompts 64 128] [--name wide_model]

Needs ``sparsedeploy runtime install deepsparse``, 8 GB of memory and 5 GB of disk. Writes
``benchmarks/results/NAME.json`` (every sample) and ``NAME.md`` after each case of cores and prompt; a case that is
measured again replaces the one before, so the cases may be measured one at a time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsedeploy import progress
from sparsedeploy.folders import write_json, write_text
from sparsedeploy.machine import usable_cores
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.reporting.benchmark_table import benchmark_markdown
from sparsedeploy.runtimes.engine import open_model
from sparsedeploy.speed.benchmark import BenchmarkResult, benchmark
from sparsedeploy.speed.options import BenchmarkOptions
from sparsedeploy.targets.registry import export_checkpoint

SPARSITIES = (0.0, 0.5, 0.7, 0.9)
DECODE_TOKENS = 16
RESULTS = Path(__file__).resolve().parent / "results"
CONFIG = LlamaConfig(
    hidden_size=2048,
    intermediate_size=5504,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=4,
    vocab_size=4096,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, help="folder for the models, kept for the next run [default: a temporary one]"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cores", type=int, nargs="+", default=sorted({usable_cores(), 1}, reverse=True))
    parser.add_argument("--name", default="wide_model", help="name of the files under benchmarks/results")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 128])
    options = parser.parse_args()
    progress.show()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        folders = [make_artifact(work, sparsity) for sparsity in SPARSITIES]
        checks = {folder.name: read_difference(folder) for folder in folders}
        for cores in options.cores:
            for prompt in options.prompts:
                progress.note(f"{cores} cores, prompt of {prompt} tokens")
                result = benchmark(
                    folders[1:],
                    BenchmarkOptions(
                        baseline=str(folders[0]),
                        cores=(cores,),
                        prompt_lengths=(prompt,),
                        decode_tokens=DECODE_TOKENS,
                        rounds=options.rounds,
                        chunk=prompt,
                    ),
                )
                write_results(options.name, result, checks)


def make_artifact(work: Path, sparsity: float) -> Path:
    """Export the model at that sparsity; the engine's logits and torch's are compared and the difference kept."""
    name = "dense" if sparsity == 0 else f"pruned-{sparsity:.0%}".rstrip("%")
    artifact = work / name
    if artifact.is_dir() and difference_file(artifact).is_file():
        return artifact
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval().requires_grad_(False)
    for layer in find_decoder_stack(model).layers:
        for linear in layer.modules():
            if isinstance(linear, torch.nn.Linear):
                count = int(sparsity * linear.in_features)
                smallest = linear.weight.abs().topk(count, dim=1, largest=False).indices
                linear.weight.scatter_(1, smallest, 0.0)
    with tempfile.TemporaryDirectory(dir=work) as checkpoint:
        model.save_pretrained(checkpoint)
        tokenizer().save_pretrained(checkpoint)
        export_checkpoint(checkpoint, "deepsparse", artifact, overwrite=True)
    tokens = torch.randint(0, CONFIG.vocab_size, (1, 40), generator=torch.Generator().manual_seed(1))
    expected = model(tokens).logits[0].numpy()
    ids = tokens[0].tolist()
    with open_model(artifact, prompt_length=32, new_tokens=8) as loaded:
        found = np.concatenate(loaded.logits(ids[:32], ids[32:]))
    largest = {
        "largest_difference": float(np.abs(found - expected).max()),
        "largest_logit": float(np.abs(expected).max()),
    }
    write_json(difference_file(artifact), largest)
    return artifact


def difference_file(artifact: Path) -> Path:
    """Beside the artifact, so that the artifact's own hashes stay right."""
    return artifact.with_suffix(".check.json")


def read_difference(artifact: Path) -> dict[str, float]:
    values: dict[str, float] = json.loads(difference_file(artifact).read_text(encoding="utf-8"))
    return values


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single words: the export wants one, the measurement feeds random tokens."""
    words = {f"w{number}": number for number in range(CONFIG.vocab_size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")))


def write_results(name: str, result: BenchmarkResult, checks: dict[str, dict[str, float]]) -> None:
    """Add one case to the files of results, in place of the same case measured before."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    cases: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.is_file() else {}
    key = f"{result.options.cores[0]} cores, prompt {result.options.prompt_lengths[0]}"
    values = result.to_json()
    cases[key] = {"markdown": benchmark_markdown(values), **values}
    write_json(path, {"model": CONFIG.to_dict(), "checks": checks, "cases": cases})
    worst = max(check["largest_difference"] for check in checks.values())
    lines = [
        "# Wide model on DeepSparse",
        "",
        f"Llama, hidden {CONFIG.hidden_size}, intermediate {CONFIG.intermediate_size}, "
        f"{CONFIG.num_hidden_layers} layers, vocabulary {CONFIG.vocab_size}, float32, random weights pruned by "
        f"magnitude in each row. Made by `python benchmarks/wide_model.py`; every sample is in `{name}.json`. "
        f"The engine's logits differ from torch's by at most {worst:.1e}.",
        "",
    ]
    for title, case in cases.items():
        lines.extend([f"## {title}", "", case["markdown"]])
    write_text(RESULTS / f"{name}.md", "\n".join(lines))
    print(f"wrote {path} and {name}.md")


if __name__ == "__main__":
    main()
