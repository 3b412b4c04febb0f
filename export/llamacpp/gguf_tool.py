"""GGUF files, in sparsedeploy's own Python, by llama.cpp's converter: ``gguf_tool.py convert|zeros|layout SOURCE ...``.

``convert SOURCE CHECKPOINT OUTPUT TYPE`` runs llama.cpp's ``convert_hf_to_gguf.py`` from its sources. It knows a
tokenizer by the hash of what it makes of a text; one that it does not know is described by how it splits text, where
llama.cpp has that. ``zeros SOURCE BEFORE AFTER [TENSOR ...]`` compares the decoder layers' weights of two files, and
these tensors, and prints JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

# How llama.cpp calls the ways to split text before byte-pair encoding, by the regular expression.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_GPT2: "gpt-2", _LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}


def convert(source: Path, checkpoint: str, output: str, kind: str) -> None:
    """Write a checkpoint as a GGUF file of that type (f32, f16 or bf16)."""
    sys.path[:0] = [str(source / "gguf-py"), str(source)]
    import convert_hf_to_gguf
    from conversion.base import TextModel
    from gguf import SpecialVocab

    known, pieces = TextModel.get_vocab_base_pre, TextModel._create_vocab_sentencepiece

    def read_pieces(self: Any) -> Any:
        # The converter imports sentencepiece before it looks whether the model needs it.
        if not (Path(checkpoint) / "tokenizer.model").is_file():
            raise FileNotFoundError("tokenizer.model")
        try:
            return pieces(self)
        except ImportError:
            sys.exit("this model's tokenizer needs the package sentencepiece (pip install sentencepiece)")

    def describe(self: Any, tokenizer: Any) -> str:
        try:
            name: str = known(self, tokenizer)
        except NotImplementedError:
            found = split_name(Path(checkpoint) / "tokenizer.json")
            if found is None:
                sys.exit("llama.cpp does not have the way in which this model's tokenizer splits text")
            return found
        return name

    def refuse(self: Any) -> None:
        raise FileNotFoundError("not a Llama 2 tokenizer")

    if is_byte_level(Path(checkpoint) / "tokenizer.json"):
        # It takes every tokenizer with a byte fallback for one of Llama 2.
        TextModel._set_vocab_llama_hf = refuse
        vocabulary: Any = SpecialVocab  # its types are known only where gguf is installed
        add = vocabulary.add_to_gguf

        def with_merges(self: Any, *arguments: Any, **options: Any) -> None:
            # llama.cpp wants at least one; this one never applies: symbols start as single characters.
            self.merges = self.merges or ["none none"]
            add(self, *arguments, **options)

        vocabulary.add_to_gguf = with_merges
    TextModel.get_vocab_base_pre, TextModel._create_vocab_sentencepiece = describe, read_pieces
    sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outfile", output, "--outtype", kind]
    convert_hf_to_gguf.main()


def _steps(path: Path) -> list[dict[str, Any]]:
    """The steps in which a ``tokenizer.json`` splits text; none where there is no such file."""
    if not path.is_file():
        return []
    step = json.loads(path.read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    steps: list[dict[str, Any]] = step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]
    return steps


def is_byte_level(path: Path) -> bool:
    """Whether its tokens are made of bytes, as GPT-2's."""
    return any(step.get("type") == "ByteLevel" for step in _steps(path))


def split_name(path: Path) -> str | None:
    """llama.cpp's name of the way in which a ``tokenizer.json`` splits text; None where it has none."""
    steps = _steps(path)
    kinds = [step.get("type") for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        return None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return _SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""))
    return None


def zeros(source: Path, before: str, after: str, *others: str) -> dict[str, Any]:
    """Count the zeros of the decoder layers' matrices, and those of the first file that the second has lost.

    Args:
        others: tensors that count besides.

    Returns:
        ``weights`` and ``zeros`` of the second file, ``pruned`` zeros of the first, of which ``revived`` are not zero
        any more, ``types``: how many matrices there are of each type, and ``bytes_per_token``: what decoding a token
        must at least read of the second file, its matrices as a bitmask with their values where that is smaller.
    """
    sys.path.insert(0, str(source / "gguf-py"))
    from gguf import GGUFReader
    from gguf.quants import dequantize

    first, second = ({tensor.name: tensor for tensor in GGUFReader(name).tensors} for name in (before, after))
    result: dict[str, Any] = {"weights": 0, "zeros": 0, "pruned": 0, "revived": 0, "types": {}, "bytes_per_token": 0}
    for name, tensor in second.items():
        if name == "token_embd.weight" and "output.weight" in second:
            continue  # a row of it is looked up; without an output head of its own it is the head
        result["bytes_per_token"] += int(tensor.n_bytes)
        inside = name.startswith("blk.") and name.endswith(".weight") and len(tensor.shape) >= 2
        if not inside and name not in others:
            continue
        old = dequantize(first[name].data, first[name].tensor_type) == 0
        new = dequantize(tensor.data, tensor.tensor_type) == 0
        size, kept = new.size, new.size - int(np.count_nonzero(new))
        packed = -(-size // 8) + kept * int(tensor.n_bytes) // size
        result["bytes_per_token"] -= max(0, int(tensor.n_bytes) - packed)
        result["weights"] += new.size
        result["zeros"] += int(np.count_nonzero(new))
        result["pruned"] += int(np.count_nonzero(old))
        result["revived"] += int(np.count_nonzero(old & ~new))
        kind = tensor.tensor_type.name
        result["types"][kind] = result["types"].get(kind, 0) + 1
    return result


def layout(source: Path, *names: str) -> list[list[dict[str, Any]]]:
    """Of each file, where its tensors lie: name, shape ``[..., rows, columns]``, type, first byte and bytes."""
    sys.path.insert(0, str(source / "gguf-py"))
    from gguf import GGUFReader

    return [
        [
            {
                "name": tensor.name,
                "shape": [int(size) for size in reversed(tensor.shape)],
                "kind": tensor.tensor_type.name,
                "start": int(tensor.data_offset),
                "size": int(tensor.n_bytes),
            }
            for tensor in GGUFReader(name).tensors
        ]
        for name in names
    ]


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), *sys.argv[3:])
    elif sys.argv[1] == "layout":
        print(json.dumps(layout(Path(sys.argv[2]), *sys.argv[3:])))
    else:
        print(json.dumps(zeros(Path(sys.argv[2]), *sys.argv[3:])))
