"""Perplexity of pruned weights in 8 and 4 bits: rounded in the sweep that prunes, and rounded to nearest afterwards.

    python benchmarks/quantized.py MODEL CALIBRATION_TEXT TEST_TEXT [--cells "METHOD|ROUNDING|RATE" ...]

Every finished cell is stored at once; run it again to go on where it stopped. ``nearest`` puts the largest value of
each 32 columns at the end of the codes, as llama.cpp's quantiser does. ``gptq4`` is llm-compressor's GPTQ on the pruned
checkpoint with its masks held (needs ``sparsedeploy runtime install llmcompressor``), in the largest groups that divide
every width, and ``sweep4*`` our sweep in those groups. Texts and windows are those of frontier.py.
"""

from __future__ import annotations

import math
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cells import Setting, Store, setting_parser, target_of

from sparsedeploy import progress
from sparsedeploy.allocation import allocate
from sparsedeploy.grid import Grid
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.pruning.layers import prune_model
from sparsedeploy.registry import ALLOCATORS, PRUNERS
from sparsedeploy.runtimes.environments import require
from sparsedeploy.runtimes.llmcompressor import quantize_folder

ROUNDINGS = ("none", "nearest8", "sweep8", "nearest4", "sweep4", "gptq4", "sweep4*")
CELLS = [
    f"{method}|{rounding}|{rate}"
    for rate in ("0.5", "0.7")
    for method in ("sparsegpt", "wanda", "alps")
    for rounding in ROUNDINGS
    if method == "sparsegpt" or rounding not in ("gptq4", "sweep4*")
]


def round_to_nearest(weight: torch.Tensor, grid: Grid) -> None:
    """In place, every group of columns by itself."""
    groups = weight.reshape(len(weight), -1, grid.group)
    extreme = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scale = (extreme / grid.ends[0]).half().float()
    scale = torch.where(scale == 0, 1, scale)
    weight.copy_((grid.codes(groups, scale) * scale).reshape(weight.shape))


def by_gptq(setting: Setting, model: Any, masks: dict[str, torch.Tensor], tokens: torch.Tensor) -> float:
    """The perplexity after llm-compressor's GPTQ, with 4 bits and the masks held."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pruned"
        model.save_pretrained(folder)
        setting.tokenizer.save_pretrained(folder)
        windows = setting.test_windows
        where, output = require("llmcompressor"), Path(scratch) / "quantised"
        found = quantize_folder(where, folder, output, "w4a16", "gptq", masks, tokens, windows, probe=windows[0, :32])
    assert found["revived"] == 0
    return float(found["perplexity_after"])


def cell_of(setting: Setting, method: str, rounding: str, rate: str) -> dict[str, Any]:
    """Prune uniformly, round, measure."""
    kind, bits = rounding.rstrip("48*"), rounding.rstrip("*")[-1]
    model = setting.dense_model()
    linears = find_decoder_stack(model).all_linears()
    group = next(group for group in (128, 64, 32) if all(each.in_features % group == 0 for each in linears.values()))
    tokens = setting.calibration_set(0).tokens
    plan = allocate(model, tokens, *target_of(rate), "uniform", ALLOCATORS.get("uniform").make_options())
    used = time.process_time()
    options = PRUNERS.get(method).make_options()
    grid = Grid(int(bits), group if rounding.endswith("*") else 32) if kind == "sweep" else None
    pruned = prune_model(model, tokens, plan, method, options, grid=grid)
    if kind == "gptq":
        masks = {name: module.mask for name, module in pruned.items()}
        return {"perplexity": by_gptq(setting, model, masks, tokens), "group": group}
    if kind == "nearest":
        for linear in linears.values():
            round_to_nearest(linear.weight.data, Grid(int(bits)))
    used = time.process_time() - used
    value = setting.perplexity(model)
    return {"perplexity": value if math.isfinite(value) else None, "prune_cpu_s": round(used, 1)}


def group_text(cells: dict[tuple[str, ...], Any]) -> str:
    found = {cell["group"] for cell in cells.values() if "group" in cell}
    return f": {found.pop()}" if found else ""


def markdown(content: dict[str, Any]) -> str:
    """One table per rate: perplexity, and its rise over the same weights unrounded."""
    cells = {tuple(key.split("|")): cell for key, cell in content["cells"].items()}
    lines = [
        "# Pruned weights in 8 and 4 bits",
        "",
        f"{content['model']['name']}, dense {content['dense']:.2f}; uniform rates, groups of 32, calibrated on "
        f"{content['calibration']['sequences']} sequences of {content['calibration']['length']} tokens of "
        f"{content['calibration']['data']}, perplexity on {content['test']['bytes']:,} bytes of "
        f"{content['test']['data']}. In brackets: against the same pruning without rounding. `gptq4`: llm-compressor's "
        f"GPTQ, masks held, and `sweep4*`, in the largest groups that divide every width{group_text(cells)}.",
        "",
    ]
    for rate in sorted({rate for _, _, rate in cells}):
        lines += [
            f"## {float(rate):.0%}",
            "",
            "| method | " + " | ".join(ROUNDINGS) + " |",
            "|---" * (1 + len(ROUNDINGS)) + "|",
        ]
        for method in sorted({m for m, _, r in cells if r == rate}):
            plain = cells.get((method, "none", rate), {}).get("perplexity")
            row = []
            for rounding in ROUNDINGS:
                value = cells.get((method, rounding, rate), {}).get("perplexity")
                rise = f" ({value / plain - 1:+.1%})" if value and plain and rounding != "none" else ""
                row.append(f"{value:.2f}{rise}" if value else "")
            lines.append(f"| {method} | " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = setting_parser(__doc__)
    parser.add_argument("--cells", nargs="*", default=CELLS)
    arguments = parser.parse_args()
    setting = Setting(arguments.model, arguments.calibration, arguments.test)
    progress.show(False)
    beside = {"machine": platform.processor() or platform.machine()}
    path = arguments.output / f"quantized_{arguments.model.name}.json"
    store = Store(path, setting.header(), markdown, beside=beside)
    if "dense" not in store.content:
        dense = setting.perplexity(setting.dense_model())
        store.change(lambda content: content.update(dense=dense))
    for key in arguments.cells:
        if store.missing(key):
            store.add(key, cell_of(setting, *key.split("|")))
            print(key, store.content["cells"][key], flush=True)


if __name__ == "__main__":
    main()
