"""Write docs/families.md: what pruning gives for every causal LM that transformers knows.

Run from the repository's root: ``python -m tests.family_table > docs/families.md``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from sparsedeploy.errors import UserError
from sparsedeploy.models.linear_views import watchable_experts
from sparsedeploy.models.loading import load_model
from tests.families import calibration_tokens, families, left_out, product_masks, saved_family
from tests.oracle import differences, wanda_masks

_HEAD = """# Families

Every causal LM that transformers {version} knows, as a random model of five layers with sliding windows, experts and
shared caches where its configuration has them. Six sequences are pruned to 50 % by Wanda, four at once; every mask is
compared with one from whole forward passes of transformers (`tests/oracle.py`). `equal` means every mask of every
module, bit for bit, in float32.

`python -m tests.family_table > docs/families.md` wrote this page in {seconds:.0f} s.

| family | masks |
|---|---|
"""


def outcome(family: str) -> str:
    """What pruning gives: how many masks are equal, the refusal, or what is wrong."""
    reason = left_out(family)
    if reason is not None:
        return f"not tested: {reason}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            saved_family(family, Path(folder))
        except Exception as error:  # whatever transformers says of a configuration
            return f"not built: {' '.join(str(error).split())[:160]}"
        try:
            masks = product_masks(Path(folder), batch_size=4)
        except UserError as error:
            return f"refused: {str(error.message).replace(folder, 'MODEL')}"
        except Exception as error:
            return f"**crashed**: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        truth = load_model(Path(folder), dtype=torch.float32)
        watchable_experts(truth)
        wrong = differences(masks, *wanda_masks(truth, masks, calibration_tokens(), 0.5))
    if not wrong:
        return f"equal ({len(masks)} modules)"
    return f"{len(wrong)} of {len(masks)} differ, by up to {max(wrong.values()):.0e} of a score"


def main() -> None:
    import transformers

    started, rows = time.perf_counter(), []
    for family in families():
        rows.append(f"| {family} | {outcome(family)} |")
        print(rows[-1], file=sys.stderr, flush=True)
    sys.stdout.write(_HEAD.format(version=transformers.__version__, seconds=time.perf_counter() - started))
    sys.stdout.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
