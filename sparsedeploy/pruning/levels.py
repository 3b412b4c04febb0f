"""The level database: each linear pruned at several rates from the dense model's statistics, on disk.

A folder: ``levels.json`` says for which model, method and text it is; each file of ``MODULE/`` holds the levels of one
pass, ``ZEROS[-N-M].mask`` (one bit a weight) and ``ZEROS[-N-M].kept`` (the kept weights). A file appears whole or not
at all, so an interrupted pass goes on where it stopped, and levels are added for every new target.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sparsedeploy import progress
from sparsedeploy.calibration.driver import LayerDriver, iterate_weights
from sparsedeploy.calibration.statistics import InputStatistics, Kind, richest
from sparsedeploy.errors import UserError
from sparsedeploy.folders import check_free_space, write_bytes, write_json
from sparsedeploy.grid import Grid
from sparsedeploy.masks import pack_bits, unpack_bits
from sparsedeploy.models.layers import LayerSource
from sparsedeploy.models.linear_views import PrunableLinear
from sparsedeploy.plan import ModuleTarget
from sparsedeploy.pruning.layers import prune_linear
from sparsedeploy.reading import read_object
from sparsedeploy.registry import PRUNERS

HEADER = "levels.json"
FORMAT = 2
_WEIGHT = 4  # bytes, at most
_BATCH = 256 << 20  # bytes of levels that one file collects before it is written


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
        self._files: dict[str, dict[str, Path]] = {}
        asked = {"format": FORMAT, **json.loads(json.dumps(dict(identity)))}
        path = self.folder / HEADER
        if not path.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise UserError(f"{self.folder} is not a level database", "Name another folder, or an empty one.")
            write_json(path, asked)
            return
        stored = read_object(path, fix="Name another folder for the level database.")
        different = [key for key in sorted({*asked, *stored}) if stored.get(key) != asked.get(key)]
        if different:
            raise UserError(
                f"the level database {self.folder} is for another run: {', '.join(different)} differ",
                "Name another folder with the allocation option database, or run with the same options.",
            )

    def holds(self, target: ModuleTarget) -> bool:
        """Whether that level of that module is stored.

        Raises:
            UserError: a file that is broken.
        """
        return _level(target) in self._stored(target.name)

    def write(self, name: str, content: dict[str, torch.Tensor]) -> None:
        """Store levels of a module in a file of their own."""
        digest = hashlib.sha256(" ".join(sorted(content)).encode()).hexdigest()[:16]
        path = self.folder / name / f"{digest}.safetensors"
        write_bytes(path, save(content))
        self._stored(name).update(dict.fromkeys((key.rpartition(".")[0] for key in content), path))

    def read(self, target: ModuleTarget) -> torch.Tensor:
        """The weight ``[rows, columns]`` of a level.

        Raises:
            UserError: a file that is missing or broken.
        """
        path = self._stored(target.name).get(_level(target))
        if path is None:
            raise _broken(self.folder / target.name / f"({_level(target)})", "no such level")
        try:
            with safe_open(path, framework="pt") as file:
                mask = unpack_bits(file.get_tensor(f"{_level(target)}.mask"), target.columns)
                kept = file.get_tensor(f"{_level(target)}.kept")
            return torch.zeros(target.rows, target.columns, dtype=kept.dtype).masked_scatter_(mask, kept)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise _broken(path, str(error)) from error

    def _stored(self, name: str) -> dict[str, Path]:
        """The levels of a module and their files."""
        if name not in self._files:
            found: dict[str, Path] = {}
            for path in sorted((self.folder / name).glob("*.safetensors")):
                try:
                    with safe_open(path, framework="pt") as file:
                        found.update(dict.fromkeys((key.rpartition(".")[0] for key in file.keys()), path))  # noqa: SIM118
                except (SafetensorError, OSError) as error:
                    raise _broken(path, str(error)) from error
            self._files[name] = found
        return self._files[name]


@dataclass(frozen=True)
class Wanted:
    """Levels that a database shall hold, and what makes them.

    Attributes:
        reconstruct, grid: see :func:`~sparsedeploy.pruning.layers.prune_layers`.
    """

    database: LevelDatabase
    targets: Iterable[ModuleTarget]
    method: str
    options: Any
    reconstruct: bool = False
    grid: Grid | None = None

    @property
    def needs(self) -> Kind:
        """The statistics that are read."""
        needs: Kind = PRUNERS.get(self.method).traits["needs"]
        return "hessian" if self.reconstruct or self.grid else needs

    def missing(self) -> dict[str, list[ModuleTarget]]:
        """By module, what is not stored yet."""
        found: dict[str, list[ModuleTarget]] = {}
        for target in dict.fromkeys(self.targets):
            if not self.database.holds(target):
                found.setdefault(target.name, []).append(target)
        return found

    def add(
        self, name: str, linear: PrunableLinear, statistics: InputStatistics | None, targets: Iterable[ModuleTarget]
    ) -> None:
        """Make and store levels of one linear, which is not changed."""
        content: dict[str, torch.Tensor] = {}
        method = PRUNERS.get(self.method)
        for target in targets:
            pruned = prune_linear(method, linear, statistics, target, self.options, self.reconstruct, self.grid)
            content[f"{_level(target)}.mask"] = pack_bits(pruned.mask).cpu()
            content[f"{_level(target)}.kept"] = pruned.weight[pruned.mask].cpu()
            if sum(tensor.nbytes for tensor in content.values()) >= _BATCH:
                self.database.write(name, content)
                content = {}
        if content:
            self.database.write(name, content)


@torch.no_grad()
def add_levels(
    source: LayerSource,
    tokens: torch.Tensor | None,
    wanted: Sequence[Wanted],
    *,
    batch_size: int | None = None,
    accumulate: torch.dtype = torch.float32,
) -> None:
    """Prune the dense model's linears at the levels that are not stored yet, in one pass for all databases.

    The model is not changed.

    Args:
        tokens: calibration sequences int64 ``[sequences, length]``; None for methods that need none.

    Raises:
        UserError: no tokens for a method that needs them, too little free space, or weights or activations that are
            not finite.
    """
    missing = [(each, targets) for each in wanted if (targets := each.missing())]
    if not missing:
        return
    every = [target for _, by_name in missing for targets in by_name.values() for target in targets]
    size = sum((target.size - target.zeros) * _WEIGHT + target.size // 8 for target in every)
    check_free_space(missing[0][0].database.folder, size)
    names = ", ".join(dict.fromkeys(each.method for each, _ in missing))
    needs = richest(*(each.needs for each, _ in missing))
    if needs == "none":
        layers = iterate_weights(source)
    elif tokens is None:
        raise UserError(f"{names} needs calibration text and none was given", "Add --data.")
    else:
        driver = LayerDriver(source, tokens, batch_size=batch_size, accumulate=accumulate)
        layers = driver.iterate(needs, changes_weights=False)
    with progress.bar(f"level database ({names})", len(source.stack), "layers") as advance:
        for layer in layers:
            for statistics in layer.statistics.values():
                statistics.reused = len(missing) > 1
            for name, linear in layer.linears.items():
                for each, targets in missing:
                    each.add(name, linear, layer.statistics.get(name), targets.get(name, ()))
            advance()


def _level(target: ModuleTarget) -> str:
    pattern = target.pattern
    return f"{target.zeros_per_row}" + ("" if pattern is None else f"-{pattern.n}-{pattern.m}")


def _broken(path: Path, reason: str) -> UserError:
    return UserError(
        f"the level database's file {path} is missing or broken ({' '.join(reason.split())[:120]})",
        f"Delete {path.parent} and run the command again.",
    )
