"""The level database: each linear pruned at several rates from the dense model's statistics, on disk.

A folder: ``levels.json`` says for which model, method and text it is; ``MODULE/ZEROS[-N-M].safetensors`` holds the mask
(one bit a weight) and the kept weights of one level. A file appears whole or not at all, so an interrupted pass goes on
where it stopped, and levels are added for every new target.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sparsedeploy import progress
from sparsedeploy.calibration.driver import LayerContext, LayerDriver, iterate_weights
from sparsedeploy.calibration.statistics import Kind
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_bytes, write_json
from sparsedeploy.masks import pack_bits, unpack_bits
from sparsedeploy.models.layers import LayerSource
from sparsedeploy.plan import ModuleTarget
from sparsedeploy.pruning.layers import prune_linear
from sparsedeploy.registry import PRUNERS

HEADER = "levels.json"
FORMAT = 1


class LevelDatabase:
    """Pruned weights by module and level.

    Args:
        folder: made when it is not there.
        identity: what decides a level besides its target, as flat plain data: model, method, options, text.

    Raises:
        UserError: a folder of another model, method or text, or one that is not a database.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        asked = {"format": FORMAT, **json.loads(json.dumps(dict(identity)))}
        path = self.folder / HEADER
        if not path.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise UserError(f"{self.folder} is not a level database", "Name another folder, or an empty one.")
            write_json(path, asked)
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            different = [key for key in sorted({*asked, *stored}) if stored.get(key) != asked.get(key)]
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise UserError(f"{path} is not a level database's header ({error})", "Name another folder.") from error
        if different:
            raise UserError(
                f"the level database {self.folder} is for another run: {', '.join(different)} differ",
                "Name another folder with the allocation option database, or run with the same options.",
            )

    def holds(self, target: ModuleTarget) -> bool:
        """Whether that level of that module is stored."""
        return self._path(target).exists()

    def add(
        self,
        source: LayerSource,
        tokens: torch.Tensor | None,
        targets: Iterable[ModuleTarget],
        method: str,
        options: Any,
        *,
        reconstruct: bool = False,
        batch_size: int | None = None,
        accumulate: torch.dtype = torch.float32,
    ) -> None:
        """Prune the dense model's linears at the levels that are not stored yet, in one pass; it is not changed.

        Raises:
            UserError: no tokens for a method that needs them, or weights or activations that are not finite.
        """
        missing: dict[str, list[ModuleTarget]] = {}
        for target in dict.fromkeys(targets):
            if not self.holds(target):
                missing.setdefault(target.name, []).append(target)
        if not missing:
            return
        needs: Kind = "hessian" if reconstruct else PRUNERS.get(method).traits["needs"]
        if needs == "none":
            layers = iterate_weights(source)
        elif tokens is None:
            raise UserError(f"{method} measures calibration text and none was given", "Add --data.")
        else:
            driver = LayerDriver(source, tokens, batch_size=batch_size, accumulate=accumulate)
            layers = driver.iterate(needs, changes_weights=False)
        with progress.bar(f"level database ({method})", len(source.stack.layers), "layers") as advance, torch.no_grad():
            for layer in layers:
                self._add_layer(layer, missing, method, options, reconstruct)
                advance()

    def _add_layer(
        self,
        layer: LayerContext,
        missing: Mapping[str, list[ModuleTarget]],
        method: str,
        options: Any,
        reconstruct: bool,
    ) -> None:
        for name, linear in layer.linears.items():
            statistics = layer.statistics.get(name)
            for target in missing.get(name, ()):
                pruned = prune_linear(PRUNERS.get(method), linear, statistics, target, options, reconstruct)
                content = {"mask": pack_bits(pruned.mask).cpu(), "kept": pruned.weight[pruned.mask].cpu()}
                write_bytes(self._path(target), save(content))

    def read(self, target: ModuleTarget) -> torch.Tensor:
        """The weight ``[rows, columns]`` of a level.

        Raises:
            UserError: a file that is missing or broken.
        """
        path = self._path(target)
        try:
            with safe_open(path, framework="pt") as file:
                mask = unpack_bits(file.get_tensor("mask"), target.columns)
                kept = file.get_tensor("kept")
            return torch.zeros(target.rows, target.columns, dtype=kept.dtype).masked_scatter_(mask, kept)
        except (SafetensorError, OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"the level database's file {path} is missing or broken ({reason})",
                f"Delete {path.parent} and run the command again.",
            ) from error

    def _path(self, target: ModuleTarget) -> Path:
        level = f"{target.zeros_per_row}"
        if target.pattern is not None:
            level += f"-{target.pattern.n}-{target.pattern.m}"
        return self.folder / target.name / f"{level}.safetensors"
