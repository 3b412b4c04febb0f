"""``quantization_config`` in ``config.json``: which modules of a checkpoint are packed, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsedeploy.errors import UserError
from sparsedeploy.plan import NM

METHOD = "sparsedeploy"
VERSION = 1
BITMASK = "bitmask"
# Codes with a scale per group: their bits, and the columns of a group.
BITS = (4, 8)
GROUPS = (32, 64, 128)
_AGAIN = "Export the checkpoint again."


@dataclass(frozen=True)
class ModuleFormat:
    """How one module is packed.

    Attributes:
        kind: ``bitmask`` or N:M, such as ``2:4``.
        rows, columns: the dense shape, outputs and inputs.
        values: how many values are stored.
        bits: 8 or 4 for codes with a scale per group; None for floating-point values.
        group: columns that share a scale; None without scales.
    """

    kind: str
    rows: int
    columns: int
    values: int
    bits: int | None = None
    group: int | None = None

    @property
    def pattern(self) -> NM | None:
        """The N:M pattern; None for ``bitmask``."""
        return None if self.kind == BITMASK else NM.parse(self.kind)

    def to_dict(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"format": self.kind, "shape": [self.rows, self.columns], "values": self.values}
        if self.bits is not None:
            entry.update(bits=self.bits, group=self.group)
        return entry


@dataclass(frozen=True)
class PackedConfig:
    """The parsed ``quantization_config``.

    Attributes:
        modules: full module name -> its format.
        ignore: linears that are left dense.
    """

    modules: Mapping[str, ModuleFormat]
    ignore: tuple[str, ...] = ()
    version: int = field(default=VERSION)

    def find(self, name: str) -> str | None:
        """The key of a module, whose name may have one part more in front than in the files (``model.``)."""
        return next((key for key in (name, name.partition(".")[2]) if key in self.modules), None)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``config.json``."""
        return {
            "quant_method": METHOD,
            "format_version": self.version,
            "modules": {name: entry.to_dict() for name, entry in self.modules.items()},
            "ignore": list(self.ignore),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> PackedConfig:
        """Read and check it.

        Raises:
            UserError: another method or format version, or a malformed entry.
        """
        if values.get("quant_method") != METHOD:
            raise UserError(f"quant_method is '{values.get('quant_method')}', not {METHOD}", "Use its own loader.")
        version = values.get("format_version")
        if version != VERSION:
            raise UserError(
                f"the checkpoint has packed format version {version}, this version of sparsedeploy reads {VERSION}",
                "Use the version that wrote it, or export the checkpoint again.",
            )
        try:
            modules = {str(name): _module(str(name), entry) for name, entry in values["modules"].items()}
            ignore = tuple(str(name) for name in values.get("ignore", ()))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the quantization_config is malformed ({type(error).__name__}: {error})", _AGAIN
            ) from error
        if both := sorted(set(modules) & set(ignore)):
            raise UserError(f"the quantization_config both packs and ignores {both[0]}", _AGAIN)
        return PackedConfig(modules, ignore)


def _module(name: str, entry: Mapping[str, Any]) -> ModuleFormat:
    rows, columns = (_count(name, "shape", size) for size in entry["shape"])
    bits, group = entry.get("bits"), entry.get("group")
    if (bits is not None or group is not None) and (bits not in BITS or group not in GROUPS):
        raise UserError(
            f"{name} has codes of {bits!r} bits in groups of {group!r}",
            f"Known: bits {' and '.join(map(str, BITS))}, groups of {', '.join(map(str, GROUPS))} columns.",
        )
    result = ModuleFormat(str(entry["format"]), rows, columns, _count(name, "values", entry["values"]), bits, group)
    pattern = result.pattern
    if pattern is not None and pattern.m not in (4, 8):
        raise UserError(f"{name} has format {result.kind}", "Known: bitmask, N:4 and N:8.")
    if pattern is not None and columns % pattern.m:
        raise UserError(f"{name} has {columns} columns, not whole groups of {pattern.m}", _AGAIN)
    expected = None if pattern is None else rows * (columns // pattern.m) * pattern.n
    if result.values > rows * columns or (expected is not None and result.values != expected):
        raise UserError(
            f"{name}: {result.values} values do not fit {result.kind} weights of {rows} x {columns}", _AGAIN
        )
    return result


def _count(name: str, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{name}: {key} is {value!r} in the quantization_config", _AGAIN)
    return value
