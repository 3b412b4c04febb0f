"""What ``deploy`` can aim at; nothing heavy is imported, since the command line's help lists it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CPU = "cpu"


@dataclass(frozen=True)
class Aim:
    """An export target and the formats that are tried for it.

    Attributes:
        formats: name -> the options of the export; the smallest difference from the checkpoint first.
        baseline: the format of the dense model to compare with; None for the plain folder.
        serves: whether its runtime has a server.
    """

    name: str
    formats: Mapping[str, Mapping[str, str]]
    baseline: str | None
    serves: bool = True


AIMS = {
    aim.name: aim
    for aim in (
        Aim("llamacpp", {"q8_0": {"quantize": "q8_0"}, "q4_0": {"quantize": "q4_0"}}, "q8_0"),
        Aim("deepsparse", {"float32": {}, "int8": {"int8": "true", "windows": "0"}}, "float32"),
        Aim("vllm", {"packed": {}}, None),
        Aim("onnxruntime", {"float32": {}}, "float32", serves=False),
    )
}
