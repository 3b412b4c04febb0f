"""Which files of a folder are the model: those that the index names, or the single ``model.safetensors``."""

from __future__ import annotations

from pathlib import Path

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.reading import SOUND_COPY, Fields, contained, inside, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What holds weights in some format: never copied into a folder of ours, since a loader could take it for the model.
WEIGHT_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".safetensors")
_PEFT_CONFIG, _PEFT_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors shards of a model, sorted by name.

    Raises:
        UserError: there are none, one is missing or leads out of the folder, or the index and ``model.safetensors``
            are two models; also a PEFT adapter beside the weights, which some programs would merge and others not.
    """
    refuse_peft_adapter(folder)
    weight_map = read_index(folder)
    single = folder / SINGLE
    if weight_map is None:
        if not single.exists():
            raise _none(folder)
        names = [SINGLE]
    else:
        names = sorted(set(weight_map.values()))
    paths = [contained(folder, name, str(folder / INDEX if weight_map else folder)) for name in names]
    if nested := next((name for name in names if name != Path(name).name), None):
        raise UserError(
            f"{folder / INDEX} names {progress.printable(nested)}, which is not the plain name of a file beside it",
            "Move the shards beside the index, and name them without a folder.",
        )
    if single.exists() and SINGLE not in names:
        raise UserError(
            f"{folder} holds two models: {SINGLE}, and the shards that {INDEX} names",
            "Remove the one that you do not want.",
        )
    for path in paths:
        if not path.exists():
            raise UserError(f"{folder / INDEX} names {path.name}, which is missing", "Download the missing shard.")
        if not path.is_file():
            raise UserError(f"{path} is not a file", SOUND_COPY)
    return paths


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> shard name; None where the folder has no index.

    Raises:
        UserError: a broken index.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    whole = Fields(read_object(path, fix="Download it again."), str(path), "Download it again.")
    if "metadata" not in whole.values:
        raise UserError(f"{path} lacks 'metadata', which transformers needs", 'Add "metadata": {} to it.')
    fields = whole.fields("weight_map")
    weight_map = {name: fields.text(name) for name in fields.values}
    if not weight_map:
        raise UserError(f"{path}: 'weight_map' is empty", "Download it again.")
    return weight_map


def stray_weights(folder: Path) -> list[str]:
    """Names of the files in a model folder that hold weights and are not the model, sorted."""
    model = {path.name for path in weight_files(folder)}
    return sorted(p.name for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES and p.name not in model)


def note_left_out(folder: Path) -> None:
    """Say which files with weights are not the model, and so are not in what is made of it."""
    if names := stray_weights(folder):
        progress.note(f"left out, not part of the model by its index: {', '.join(names)}")


def small_files(folder: Path) -> list[Path]:
    """What travels with the weights, sorted by name: every other file, save those that hold weights or list them.

    Raises:
        UserError: a link that leads out of the folder.
    """
    files = []
    for path in sorted(folder.iterdir()):
        if path.suffix in WEIGHT_SUFFIXES or (path.name.endswith(".index.json") and path.name != INDEX):
            continue
        if path.is_symlink() and not inside(folder, path):
            raise UserError(
                f"{path} is a link out of its folder, so it is not copied", "Put the file itself there, or remove it."
            )
        if path.is_file():
            files.append(path)
    return files


def refuse_peft_adapter(folder: Path) -> None:
    """Refuse an adapter of PEFT beside the weights: transformers merges it where PEFT is installed, else ignores it.

    Raises:
        UserError: there is one.
    """
    for name in (_PEFT_CONFIG, *_PEFT_WEIGHTS):
        if (folder / name).exists():
            if not (folder / "config.json").exists():
                raise UserError(f"{folder} is a PEFT adapter, not a model", "Give the folder of the merged model.")
            raise UserError(
                f"{folder} holds a PEFT adapter ({name}) beside the weights",
                "Merge it first (peft: PeftModel.merge_and_unload, then save_pretrained), or move the adapter away.",
            )


def _none(folder: Path) -> UserError:
    pickles = [*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if pickles:
        return UserError(
            f"{folder} holds its weights as {pickles[0].name}, a pickle, which can run code when it is loaded",
            "Convert it to safetensors where you trust it: python -c 'import sys; from transformers import "
            "AutoModelForCausalLM as M; M.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])' OLD NEW",
        )
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.exists())
    if others:
        return UserError(
            f"{folder} holds {others[0]} but neither {SINGLE} nor {INDEX}, so it is unclear which files are the model",
            f"Rename the file to {SINGLE}, or add the index.",
        )
    return UserError(
        f"{folder} holds no .safetensors weights ({SINGLE} or {INDEX})", "Give a folder with .safetensors weights."
    )
