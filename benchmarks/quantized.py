"""Perplexity of pruned weights in 8 and 4 bits: rounded in the sweep that prunes, and rounded to nearest afterwards.

    python benchmarks/quantized.py MODEL CALIBRATION_TEXT TEST_TEXT [--cells "METHOD|ROUNDING|RATE" ...]

Every finished cell is stored at once; run it again to go on where it stopped. ``nearest`` puts the largest value of
each 32 columns at the end of the codes, as llama.cpp's quantiser does. Texts and windows are those of frontier.py.
"""

from __future__ import annotations

import math
import platform
import time
from typing import Any

import torch
from cells import Setting, Store, setting_parser, target_of

from sparsedeploy import progress
from sparsedeploy.allocation import allocate
from sparsedeploy.grid import Grid
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.pruning.layers import prune_model
from sparsedeploy.registry import ALLOCATORS, PRUNERS

ROUNDINGS = ("none", "nearest8", "sweep8", "nearest4", "sweep4")
CELLS = [
    f"{method}|{rounding}|{rate}"
    for rate in ("0.5", "0.7")
    for method in ("sparsegpt", "wanda", "alps")
    for rounding in ROUNDINGS
]


def round_to_nearest(weight: torch.Tensor, grid: Grid) -> None:
    """In place, every group of columns by itself."""
    groups = weight.reshape(len(weight), -1, grid.group)
    extreme = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scale = (extreme / grid.ends[0]).half().float()
    scale = torch.where(scale == 0, 1, scale)
    weight.copy_((grid.codes(groups, scale) * scale).reshape(weight.shape))


def cell_of(setting: Setting, method: str, rounding: str, rate: str) -> dict[str, Any]:
    """Prune uniformly, round, measure."""
    kind, bits = rounding.rstrip("48"), rounding[-1]
    model = setting.dense_model()
    tokens = setting.calibration_set(0).tokens
    plan = allocate(model, tokens, *target_of(rate), "uniform", ALLOCATORS.get("uniform").make_options())
    used = time.process_time()
    options = PRUNERS.get(method).make_options()
    prune_model(model, tokens, plan, method, options, grid=Grid(int(bits)) if kind == "sweep" else None)
    if kind == "nearest":
        for linear in find_decoder_stack(model).all_linears().values():
            round_to_nearest(linear.weight.data, Grid(int(bits)))
    used = time.process_time() - used
    value = setting.perplexity(model)
    return {"perplexity": value if math.isfinite(value) else None, "prune_cpu_s": round(used, 1)}


def markdown(content: dict[str, Any]) -> str:
    """One table per rate: perplexity, and its rise over the same weights unrounded."""
    cells = {tuple(key.split("|")): cell for key, cell in content["cells"].items()}
    lines = [
        "# Pruned weights in 8 and 4 bits",
        "",
        f"{content['model']['name']}, dense {content['dense']:.2f}; uniform rates, groups of 32, calibrated on "
        f"{content['calibration']['sequences']} sequences of {content['calibration']['length']} tokens of "
        f"{content['calibration']['data']}, perplexity on {content['test']['bytes']:,} bytes of "
        f"{content['test']['data']}. In brackets: against the same pruning without rounding.",
        "",
    ]
    for rate in sorted({rate for _, _, rate in cells}):
        lines += [f"## {float(rate):.0%}", "", "| method | " + " | ".join(ROUNDINGS) + " |", "|---" * 6 + "|"]
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
