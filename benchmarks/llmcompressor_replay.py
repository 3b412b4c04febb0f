"""Does llm-compressor prune the same weights by our recipes, what do many modifiers cost, what does quantising keep?

    python benchmarks/llmcompressor_replay.py [--preset default] [--output benchmarks/results/llmcompressor_replay]

Needs ``sparsedeploy runtime install llmcompressor``; with the vllm runtime installed too, the quantised folders are
run there as well. Three parts on a reference model: the masks of a replay against those of the built-in engine, module
by module; the same plan as one modifier and as many; pruned weights and perplexity after each quantisation.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from sparsedeploy import progress
from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.checkpoint.masks import FILE, load_masks
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json, write_text
from sparsedeploy.plan import SparsityPlan
from sparsedeploy.reference import reference_model
from sparsedeploy.runtimes import llmcompressor
from sparsedeploy.runtimes.engine import open_model
from sparsedeploy.runtimes.environments import Environment, require
from sparsedeploy.runtimes.installation import process_environment
from sparsedeploy.targets.registry import export_checkpoint
from sparsedeploy.version import __version__
from sparsedeploy.workflows.options import PruneOptions, RunOptions
from sparsedeploy.workflows.prune import prune

ROOT = Path(__file__).resolve().parents[1]
TEXT = CalibrationOptions(data="stdlib", sequences=16, length=256)
CASES = {
    "Wanda 60 %, OWL": PruneOptions(sparsity=0.6, method="wanda", allocation="owl", calibration=TEXT),
    "SparseGPT 60 %, OWL": PruneOptions(sparsity=0.6, method="sparsegpt", allocation="owl", calibration=TEXT),
    "SparseGPT 50 %": PruneOptions(sparsity=0.5, method="sparsegpt", calibration=TEXT),
    "Wanda 2:8": PruneOptions(pattern="2:8", method="wanda", calibration=TEXT),
    "SparseGPT 2:4": PruneOptions(pattern="2:4", method="sparsegpt", calibration=TEXT),
    "SparseGPT mixed-4:8, OWL": PruneOptions(
        pattern="mixed-4:8", method="sparsegpt", allocation="owl", calibration=TEXT
    ),
}
SPARSEGPT, WANDA, MIXED = "SparseGPT 60 %, OWL", "Wanda 60 %, OWL", "SparseGPT mixed-4:8, OWL"
# Windows that vLLM reads, each as long as the calibration sequences.
VLLM_WINDOWS = 8

_WHY_MASKS = """\
Agreement is the fraction of weights that both keep or both prune. Where it is below 100 %:

- SparseGPT's scores depend on every weight it has changed before: one weight that only one engine prunes changes the
  updates of later columns in its row, and the inputs of all later layers. So a difference grows with depth.
- It starts where a block's share of the zeros is no whole number (here in `down_proj`, whose {inputs} inputs are not a
  multiple of 128 and whose rates leave fractions): there the two engines prune one weight more or less in a block. The
  modules before the first such one agree to the last weight.
- It also starts where two scores are closer than float32 rounds. The engines run the text in other batches, so
  activations differ in their last digits: the N:M cases and `SparseGPT 50 %`, whose blocks have the same counts, begin
  with a pair of weights or so. Exact sums on our side alone change nothing (the built-in engine with float64 sums
  agrees with itself to {noise}). First module that differs: {first}.
- Zeros above the plan: llm-compressor selects in blocks of 128 columns and can only prune a whole number of weights in
  each; the recipe rounds a block's share up, the built-in engine spreads the exact count."""
_WHY_PASSES = """\
`independent` is the default of `oneshot`: every modifier runs the whole text through the whole model, and sees the
zeros that the modifiers before it have made in later layers, which moves its masks. `sequential` serves all modifiers
in one pass, layer by layer, as the plan was measured. So the recipe uses one modifier with a list of rates wherever it
can, and what we run and write down asks for `sequential`."""
_WHY_ZEROS = """\
Perplexity of the checkpoint ({case}) before and after, decompressed, in torch, on 32 windows of the text's test split;
in vLLM for CPUs on {windows} of the calibration sequences, where the checkpoint without quantisation has {dense}. Every
grid is symmetric, so rounding keeps zeros by itself. GPTQ moves rounding errors on to later columns, pruned ones among
them; masking its result costs what it gains with 4 bits: rounding is the default.
llm-compressor's ConstantPruningModifier multiplies by its masks after optimizer steps, of which `oneshot` takes none:
its masks change nothing (last row). Ours are applied after each layer."""

Masks = dict[str, torch.Tensor]


class Pruned:
    """One case pruned by the built-in engine, and its export for llm-compressor."""

    def __init__(self, folder: Path, options: PruneOptions, dense: Path) -> None:
        self.folder = folder / "checkpoint"
        manifest = prune(str(dense), self.folder, options, RunOptions(device="cpu"))
        self.plan = manifest.plan
        self.masks = masks_of(self.folder, self.plan)
        self.export = folder / "export"
        export_checkpoint(self.folder, "llmcompressor", self.export)
        self.tokens = load_file(self.export / "calibration.safetensors")["tokens"]


def masks_of(folder: Path, plan: SparsityPlan) -> Masks:
    return load_masks(folder / FILE, {target.name: target.columns for target in plan.targets})


def agreement(plan: SparsityPlan, ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """The fraction of weights that both masks keep or both prune, over all modules."""
    same = sum(int((ours[target.name] == theirs[target.name]).sum()) for target in plan.targets)
    return same / sum(target.size for target in plan.targets)


def replay(environment: Environment, dense: Path, case: Pruned) -> dict[str, Any]:
    """Run the exported recipe and compare masks and rates, over all and for each module."""
    weights, facts = llmcompressor.prune_by_recipe(
        environment, dense, case.export / "recipe.yaml", case.plan, case.tokens, device="cpu"
    )
    theirs = {name: weight != 0 for name, weight in weights.items()}
    modules = {
        target.name: {
            "agreement": float((case.masks[target.name] == theirs[target.name]).double().mean()),
            "planned_rate": target.sparsity,
            "achieved_rate": float((~theirs[target.name]).double().mean()),
            "surplus_zeros": int((~theirs[target.name]).sum()) - target.zeros,
        }
        for target in case.plan.targets
    }
    return {"agreement": agreement(case.plan, case.masks, theirs), "seconds": facts["seconds"], "modules": modules}


def one_modifier_per_rate(recipe: str) -> str:
    """The same plan with a modifier for each distinct rate, as one rate to a modifier would need."""
    ((stage, group),) = yaml.safe_load(recipe).items()
    (((modifier, arguments),),) = (part.items() for part in group.values())
    by_rate: dict[float, list[str]] = {}
    for rate, name in zip(arguments["sparsity"], arguments["targets"], strict=True):
        by_rate.setdefault(rate, []).append(name)
    parts = {
        f"group{index}_modifiers": {modifier: {**arguments, "sparsity": rate, "targets": names}}
        for index, (rate, names) in enumerate(by_rate.items())
    }
    return yaml.safe_dump({stage: parts}, sort_keys=False)


def costs(environment: Environment, dense: Path, cases: Mapping[str, Pruned], folder: Path) -> list[dict[str, Any]]:
    """Time, passes over the text and agreement of one modifier against many, in both of llm-compressor's pipelines."""
    split = folder / "many.yaml"
    write_text(split, one_modifier_per_rate((cases[WANDA].export / "recipe.yaml").read_text(encoding="utf-8")))
    forms = [
        (WANDA, "one, with a list of rates", cases[WANDA].export / "recipe.yaml", "sequential"),
        (WANDA, "one for each rate", split, "sequential"),
        (WANDA, "one for each rate", split, "independent"),
        (MIXED, "one for each pattern", cases[MIXED].export / "recipe.yaml", "sequential"),
        (MIXED, "one for each pattern", cases[MIXED].export / "recipe.yaml", "independent"),
    ]
    rows = []
    for name, form, recipe, pipeline in forms:
        case = cases[name]
        weights, facts = llmcompressor.prune_by_recipe(
            environment, dense, recipe, case.plan, case.tokens, device="cpu", pipeline=pipeline
        )
        rows.append(
            {
                "case": name,
                "modifiers": form,
                "count": recipe.read_text(encoding="utf-8").count("Modifier:"),
                "pipeline": pipeline,
                "passes": facts["runs"] / 2,
                "seconds": facts["seconds"],
                "agreement": agreement(case.plan, case.masks, {name: weight != 0 for name, weight in weights.items()}),
            }
        )
    return rows


def quantisations(environment: Environment, case: Pruned, folder: Path, in_vllm: bool) -> list[dict[str, Any]]:
    """Every scheme and algorithm on the SparseGPT checkpoint, with masks held, and GPTQ without."""
    rows = []
    choices = [
        (scheme, algorithm)
        for scheme in ("fp8-dynamic", "w8a8", "w4a16")
        for algorithm in ("round", "gptq")
        if scheme != "fp8-dynamic"
    ]
    for scheme, algorithm in [("fp8-dynamic", "round"), *choices]:
        output = folder / f"{scheme}-{algorithm}"
        export_checkpoint(case.folder, "vllm", output, {"quantize": scheme, "algorithm": algorithm})
        artifact = load_artifact(output)
        assert artifact.quantization is not None
        row = {"masks": "held", **artifact.to_json()["quantization"], "dtype": artifact.dtype}
        row["bytes"] = (output / "model.safetensors").stat().st_size
        if in_vllm:
            row["vllm_perplexity"] = vllm_perplexity(output, case.tokens[:VLLM_WINDOWS])
        rows.append(row)
    rows.append(
        {"masks": "ConstantPruningModifier", "scheme": "w4a16", "algorithm": "gptq", **unheld(environment, case)}
    )
    return rows


def unheld(environment: Environment, case: Pruned) -> dict[str, Any]:
    """GPTQ with llm-compressor's own ConstantPruningModifier."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "tokens.npy", case.tokens.numpy())
        save_file(case.masks, folder / "masks.safetensors")
        script = ROOT / "benchmarks" / "peers" / "quantize_unheld.py"
        inputs = [case.folder, "w4a16", "gptq", folder / "tokens.npy", folder / "masks.safetensors", folder / "out"]
        done = subprocess.run(
            [str(environment.python), str(script), *map(str, inputs)],
            capture_output=True,
            text=True,
            check=True,
            env=process_environment(environment.runtime),
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {key: found[key] for key in ("pruned", "revived")}


def vllm_perplexity(folder: Path, windows: torch.Tensor) -> float:
    """exp of the mean cross-entropy of the windows' tokens, from the log-probabilities that vLLM computes."""
    losses = []
    with open_model(folder, prompt_length=windows.shape[1], new_tokens=1, runtime="vllm") as model:
        for window in windows.tolist():
            table, _ = model.logits(window[:-1], window[-1:])
            losses.append(-table[np.arange(len(window) - 1), window[1:]].mean())
    return float(np.exp(np.mean(losses)))


def markdown(result: Mapping[str, Any]) -> str:
    """The figures with what explains each difference."""
    facts = result["versions"]
    noise = result["sparsegpt_float64_agreement"]
    replays = result["replays"]
    lines = [
        "# Recipes replayed by llm-compressor",
        "",
        f"`python benchmarks/llmcompressor_replay.py`: llm-compressor {facts['llmcompressor']}, compressed-tensors "
        f"{facts['compressed-tensors']}, torch {facts['torch']}, {result['machine']}. Reference model "
        f"`{result['preset']}`, calibration on {TEXT.sequences} x {TEXT.length} tokens, the same on both sides.",
        "",
        "## Masks and rates",
        "",
        *table(
            ["case", "masks agree", "worst module", "modules with other rates", "zeros above the plan", "seconds"],
            (
                [
                    name,
                    f"{row['agreement']:.4%}",
                    f"{min(m['agreement'] for m in row['modules'].values()):.4%}",
                    str(sum(m["surplus_zeros"] != 0 for m in row["modules"].values())),
                    str(sum(m["surplus_zeros"] for m in row["modules"].values())),
                    f"{row['seconds']:.1f}",
                ]
                for name, row in replays.items()
            ),
        ),
        "",
        _WHY_MASKS.format(noise=f"{noise:.4%}", inputs=result["down_proj_inputs"], first=first_differences(replays)),
        "",
        f"By module, {SPARSEGPT}:",
        "",
        *table(
            ["module", "masks agree", "planned rate", "achieved rate", "zeros above the plan"],
            (
                [
                    name,
                    f"{module['agreement']:.4%}",
                    f"{module['planned_rate']:.6f}",
                    f"{module['achieved_rate']:.6f}",
                    str(module["surplus_zeros"]),
                ]
                for name, module in replays[SPARSEGPT]["modules"].items()
            ),
        ),
        "",
        "## One modifier or many",
        "",
        *table(
            ["case", "modifiers", "count", "pipeline", "passes over the text", "seconds", "masks agree"],
            (
                [
                    row["case"],
                    row["modifiers"],
                    str(row["count"]),
                    row["pipeline"],
                    f"{row['passes']:g}",
                    f"{row['seconds']:.1f}",
                    f"{row['agreement']:.4%}",
                ]
                for row in result["costs"]
            ),
        ),
        "",
        _WHY_PASSES,
        "",
        "## Quantised on top",
        "",
        *table(
            ["scheme", "algorithm", "masks", "pruned weights", "revived", "zeros kept", "perplexity", "in vLLM", "MB"],
            (quantised(row) for row in result["quantisations"]),
        ),
        "",
        _WHY_ZEROS.format(case=SPARSEGPT, windows=VLLM_WINDOWS, dense=dense_figure(result)),
    ]
    return "\n".join(lines) + "\n"


def first_differences(replays: Mapping[str, Any]) -> str:
    """For each SparseGPT case the first module whose masks differ."""
    found = []
    for name, row in replays.items():
        if name.startswith("SparseGPT"):
            modules = [module for module, figures in row["modules"].items() if figures["agreement"] < 1]
            found.append(f"{name}: {f'`{modules[0]}`' if modules else 'none'}")
    return "; ".join(found)


def dense_figure(result: Mapping[str, Any]) -> str:
    figure = result["vllm_perplexity_unquantised"]
    return "not measured" if figure is None else f"{figure:.3f}"


def quantised(row: Mapping[str, Any]) -> list[str]:
    before, after, in_vllm = row.get("perplexity_before"), row.get("perplexity_after"), row.get("vllm_perplexity")
    group = f", groups of {row['group_size']}" if row.get("group_size") else ""
    return [
        row["scheme"] + group,
        row["algorithm"],
        row["masks"],
        f"{row['pruned']:,}",
        f"{row['revived']:,}",
        f"{1 - row['revived'] / row['pruned']:.2%}",
        "" if after is None else f"{before:.3f} to {after:.3f}",
        "" if in_vllm is None else f"{in_vllm:.3f} ({row['dtype']})",
        "" if "bytes" not in row else f"{row['bytes'] / 1e6:.1f}",
    ]


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [headers, ["---"] * len(headers), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="default", help="reference model: default or tiny")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "llmcompressor_replay")
    arguments = parser.parse_args()
    progress.show()
    environment = llmcompressor.environment()
    try:
        require("vllm")
        in_vllm = True
    except UserError as error:
        progress.note(f"vLLM is left out: {error}")
        in_vllm = False
    dense = reference_model(arguments.preset)
    with tempfile.TemporaryDirectory() as name, llmcompressor.open_worker(environment) as worker:
        folder = Path(name)
        versions = worker.ready["versions"]
        cases = {
            case: Pruned(folder / f"case{index}", options, dense) for index, (case, options) in enumerate(CASES.items())
        }
        exact = folder / "float64"
        calibration = replace(TEXT, accumulate="float64")
        options = replace(CASES[SPARSEGPT], plan=cases[SPARSEGPT].plan, calibration=calibration)
        prune(str(dense), exact, options, RunOptions(device="cpu"))
        plan = cases[SPARSEGPT].plan
        unquantised = (
            vllm_perplexity(cases[SPARSEGPT].folder, cases[SPARSEGPT].tokens[:VLLM_WINDOWS]) if in_vllm else None
        )
        result = {
            "sparsedeploy": __version__,
            "versions": versions,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "preset": arguments.preset,
            "down_proj_inputs": plan.targets[-1].columns,
            "sparsegpt_float64_agreement": agreement(plan, cases[SPARSEGPT].masks, masks_of(exact, plan)),
            "replays": {case: replay(environment, dense, pruned) for case, pruned in cases.items()},
            "costs": costs(environment, dense, cases, folder),
            "quantisations": quantisations(environment, cases[SPARSEGPT], folder, in_vllm),
            "vllm_perplexity_unquantised": unquantised,
        }
    write_json(arguments.output.with_suffix(".json"), result)
    write_text(arguments.output.with_suffix(".md"), markdown(result))
    progress.note(f"written to {arguments.output}.json and .md")


if __name__ == "__main__":
    main()
