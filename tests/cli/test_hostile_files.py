"""Hostile files: whatever a folder holds, the answer is one line and exit code 2, and nothing outside is read."""

import json
import os
import pickle
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Outcome
from tests.cli.test_bad_input import prune, refused
from tests.cli.test_hostile_json import evaluated, perplexity

Cli = Callable[..., Outcome]
Damage = Callable[[Path], object]
INDEX = "model.safetensors.index.json"
QUERY, HEAD, NORM = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _alarm() -> Iterator[None]:
    """A pipe that nobody writes to, or a header of terabytes, must not hang the tests."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def config(**changes: object) -> Damage:
    """Damage that changes config.json."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))

    return edit


def content(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def pipe(name: str) -> Damage:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def link(name: str, target: str) -> Damage:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def folder_at(name: str) -> Damage:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return make


def header(edit: Callable[[dict[str, dict[str, list[int]]]], object]) -> Damage:
    """Damage to the header of the weights; the data stays."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        values = json.loads(data[8 : 8 + length])
        values.pop("__metadata__", None)
        edit(values)
        text = json.dumps(values).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return change


def overlap(values: dict[str, dict[str, list[int]]]) -> None:
    same = [name for name, entry in values.items() if name.endswith("q_proj.weight") and entry]
    values[same[1]]["data_offsets"] = values[same[0]]["data_offsets"]


def shift(values: dict[str, dict[str, list[int]]]) -> None:
    first = min(values, key=lambda name: values[name]["data_offsets"][0])
    values[first]["data_offsets"] = [number + 4 for number in values[first]["data_offsets"]]


def set_entry(key: str, value: object) -> Callable[[dict[str, dict[str, object]]], object]:
    return lambda values: values[next(iter(values))].update({key: value})


def index(weight_map: object, **more: object) -> Damage:
    return content(INDEX, json.dumps({"weight_map": weight_map, **(more or {"metadata": {}})}).encode())


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Damage to the tensors themselves, in a sound file."""

    def change(folder: Path) -> None:
        values = load_file(folder / "model.safetensors")
        edit(values)
        values = {name: value.contiguous() for name, value in values.items()}
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def as_type(name: str, kind: torch.dtype) -> Damage:
    return tensors(lambda values: values.update({name: (10 * values[name]).to(kind)}))


def as_named(name: str, kind: str) -> Damage:
    """Damage that calls the bytes of a tensor another type of the same size."""
    return header(lambda values: values[name].update(dtype=kind))  # type: ignore[call-overload]


def twice(folder: Path) -> None:
    """A tensor twice in the header, as two copies of one entry."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = data[8 : 8 + length].decode().rstrip()
    entry = f'"{QUERY}": {json.dumps(json.loads(text)[QUERY])}'
    whole = f"{text[:-1]}, {entry}}}".encode()
    path.write_bytes(struct.pack("<Q", len(whole)) + whole + data[8 + length :])


def nested_shard(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "deep").mkdir()
    shutil.move(folder / "model.safetensors", folder / "deep" / "a.safetensors")
    index(dict.fromkeys(names, "deep/a.safetensors"))(folder)


def copied(name: str, other: str) -> Damage:
    """Damage that stores a tensor once more, changed, under another name."""
    return tensors(lambda values: values.update({other: values[name] + 1}))


def word_pieces(folder: Path) -> None:
    """A tokenizer of another kind, which has no token for what it does not know."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "BertTokenizer"}))


def tensor(name: str, value: float) -> Damage:
    """Damage that puts a value into a tensor."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[3] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def huge_header(folder: Path) -> None:
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 3 << 30))
        file.truncate(4 << 30)


class Touch:
    """A pickle that would make a file if anything unpickled it."""

    def __reduce__(self) -> object:
        return (Path.touch, (Path("unpickled"),))


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch()))


def outside(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "away.safetensors")
    names = load_file(folder.parent / "away.safetensors")
    index(dict.fromkeys(names, "../away.safetensors"))(folder)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "config: null": (content("config.json", b"null"), "is null, not a JSON object"),
    "config: list": (content("config.json", b"[]"), "is a list"),
    "config: empty": (content("config.json", b""), "not valid JSON"),
    "config: not UTF-8": (content("config.json", b'{"a": "\xff"}'), "not JSON in UTF-8"),
    "config: byte order mark": (content("config.json", b"\xef\xbb\xbf{}"), "byte order mark"),
    "config: nested": (content("config.json", b"[" * 100_000), "nested deeper"),
    "config: a key twice": (
        content("config.json", b'{"model_type": "llama", "model_type": "opt"}'),
        "'model_type' twi",
    ),
    "config: pipe": (pipe("config.json"), "is a pipe"),
    "config: folder": (folder_at("config.json"), "is a folder"),
    "config: device": (link("config.json", "/dev/zero"), "is a device"),
    "config: no layers": (config(num_hidden_layers=0), "'num_hidden_layers' is 0"),
    "config: negative layers": (config(num_hidden_layers=-1), "'num_hidden_layers' is -1"),
    "config: layers as text": (config(num_hidden_layers="2"), "'num_hidden_layers' is a string"),
    "config: layers as fraction": (config(num_hidden_layers=2.5), "'num_hidden_layers' is a number"),
    "config: a billion layers": (config(num_hidden_layers=10**9), "'num_hidden_layers' is 1000000000"),
    "config: huge vocabulary": (config(vocab_size=10**40), "'vocab_size' is a number of about"),
    "config: no heads": (config(num_attention_heads=0), "'num_attention_heads' is 0"),
    "config: true as size": (config(hidden_size=True), "'hidden_size' is true or false"),
    "config: object as size": (config(intermediate_size={}), "'intermediate_size' is an object"),
    "config: type as number": (config(model_type=3), "'model_type' is a number"),
    "config: activation": (config(hidden_act="no such"), "config.json"),
    "config: epsilon as text": (config(rms_norm_eps="x"), "config.json"),
    "config: terminal escapes": (config(model_type="\x1b[2Jx"), "model type '\\x1b[2Jx'"),
    "config: a type of integers": (config(dtype="int8"), "config.json gives the type int8"),
    "config: a type of 8 bits": (config(dtype="float8_e4m3fn"), "config.json gives the type float8_e4m3fn"),
    "config: a part that has no place": (
        config(text_config={"hidden_size": 3}),
        "'text_config' has no place in a model",
    ),
    "config: a classifier": (config(architectures=["LlamaForSequenceClassification"]), "is a classifier"),
    "generation: list": (content("generation_config.json", b"[]"), "is a list"),
    "generation: not UTF-8": (content("generation_config.json", b"\xff"), "not JSON in UTF-8"),
    "generation: unknown cache": (
        content("generation_config.json", b'{"cache_implementation": "nope"}'),
        "generation_config.json cannot be used",
    ),
    "weights: pipe": (pipe("model.safetensors"), "is not a file"),
    "weights: folder": (folder_at("model.safetensors"), "is not a file"),
    "weights: device": (link("model.safetensors", "/dev/zero"), "link out of its folder"),
    "weights: link to nothing": (link("model.safetensors", "gone"), "holds no .safetensors weights"),
    "weights: overlap": (header(overlap), "truncated or corrupt"),
    "weights: shifted": (header(shift), "truncated or corrupt"),
    "weights: unknown type": (header(set_entry("dtype", "F7")), "unknown type 'F7'"),
    "weights: type as number": (header(set_entry("dtype", 3)), "'dtype' is a number"),
    "weights: negative shape": (header(set_entry("shape", [-1, -259])), "not a natural number"),
    "weights: shape as text": (header(set_entry("shape", "x")), "'shape' is a string"),
    "weights: huge shape": (header(set_entry("shape", [2**62, 2**62])), "does not fill its bytes"),
    "weights: one offset": (header(set_entry("data_offsets", [0])), "does not fill its bytes"),
    "weights: header of 3 GB": (huge_header, "more than 100000000"),
    "weights: header is a list": (
        content("model.safetensors", struct.pack("<Q", 2) + b"[]"),
        "is a list, not a JSON object",
    ),
    "weights: a tensor twice": (twice, f"{QUERY}' twice"),
    "weights: metadata is a list": (header(lambda values: values.update(__metadata__=[])), "'__metadata__' is a list"),
    "weights: metadata of objects": (
        header(lambda values: values.update(__metadata__={"a": {}})),  # type: ignore[dict-item]
        "'a' is an object",
    ),
    "weights: called integers": (as_named(QUERY, "I32"), f"stores {QUERY} in the type I32"),
    "weights: head called integers": (as_named(HEAD, "U32"), f"stores {HEAD} in the type U32"),
    "weights: norm called integers": (as_named(NORM, "I32"), f"stores {NORM} in the type I32"),
    "weights: integers": (as_type(QUERY, torch.int64), f"stores {QUERY} in the type I64"),
    "weights: true or false": (as_type(QUERY, torch.bool), f"stores {QUERY} in the type BOOL"),
    "weights: complex": (as_type(QUERY, torch.complex64), f"stores {QUERY} in the type C64"),
    "weights: head in 8 bits": (as_type(HEAD, torch.float8_e4m3fn), f"stores {HEAD} in the type F8_E4M3"),
    "weights: transposed": (
        tensors(lambda values: values.update({UP: values[UP].T})),
        f"{UP} is stored as (32, 88), the configuration says (88, 32)",
    ),
    "weights: head of another size": (config(vocab_size=300), "is stored as (259, 32)"),
    "weights: two names of one": (copied(QUERY, QUERY.removeprefix("model.")), "which are one weight of the model"),
    "weights: an adapter inside": (
        copied(NORM, "model.layers.0.self_attn.q_proj.lora_A.weight"),
        "adapter that is not merged",
    ),
    "weights: more layers": (
        config(num_hidden_layers=1),
        "and by its config.json the model ends with model.layers.0",
    ),
    "weights: a part of one more layer": (
        copied(QUERY, QUERY.replace(".0.", ".2.")),
        "the model ends with model.layers.1",
    ),
    "weights: fewer layers": (config(num_hidden_layers=3), "stores no tensor for model.layers.2."),
    "weights: biases": (config(attention_bias=True), "stores no tensor for model.layers.0.self_attn.q_proj.bias"),
    "weights: no head": (tensors(lambda values: values.pop(HEAD)), f"stores no tensor for {HEAD}"),
    "weights: pickle": (only_pickle, "Convert it to safetensors"),
    "index: outside": (outside, "not a name inside its folder"),
    "index: absolute": (index({"a": "/etc/passwd"}), "not a name inside its folder"),
    "index: number": (index({"a": 3}), "'a' is a number"),
    "index: no metadata": (index({"a": "model.safetensors"}, format=1), "lacks 'metadata'"),
    "index: in a folder": (nested_shard, "not the plain name of a file beside it"),
    "index: with a dot": (index({"a": "./model.safetensors"}), "not the plain name of a file beside it"),
    "index: list": (index([]), "'weight_map' is a list"),
    "index: empty": (index({}), "'weight_map' is empty"),
    "index: two models": (index({"a": "b.safetensors"}), "holds two models"),
    "index: missing tensor": (index({"a": "model.safetensors"}), "which lacks it"),
    "adapter": (content("adapter_config.json", b"{}"), "PEFT adapter"),
    "NaN in the embedding": (tensor("model.embed_tokens.weight", torch.nan), "embed_tokens.weight holds NaN"),
    "infinity in the head": (tensor("lm_head.weight", torch.inf), "lm_head.weight holds NaN"),
    "infinity in a norm": (tensor("model.norm.weight", -torch.inf), "norm.weight holds NaN"),
    "NaN in a layer's norm": (tensor("model.layers.1.input_layernorm.weight", torch.nan), "layernorm.weight holds NaN"),
    "tokenizer: list": (content("tokenizer.json", b"[]"), "is a list"),
    "tokenizer: pipe": (pipe("tokenizer_config.json"), "is a pipe"),
    "tokenizer: another kind": (word_pieces, "into token 261, the model has 259"),
    "tokenizer: broken": (content("tokenizer.json", b"{}"), "does not load"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_model_is_refused(
    cli: Cli, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, damage: tuple[Damage, str]
) -> None:
    monkeypatch.chdir(text.parent)
    make, message = damage
    make(model)
    refused(cli("eval", model, "-d", text, "--context", 32), message, model.parent)
    refused(prune(cli, model, text, "-s", 0.5), message, model.parent)
    assert not Path("unpickled").exists()


@pytest.mark.parametrize(
    "change",
    [
        config(return_dict=False),
        config(output_hidden_states=True, output_attentions=True, torchscript=True),
        config(num_nextn_predict_layers=1),
        lambda folder: (config(tie_word_embeddings=True)(folder), tensors(lambda values: values.pop(HEAD))(folder)),
        lambda folder: (
            config(tie_word_embeddings=True)(folder),
            tensors(lambda values: values.pop("model.embed_tokens.weight"))(folder),
        ),
    ],
    ids=["tuples", "outputs", "predicting layers", "tied, no head", "tied, no embedding"],
)
def test_what_is_only_odd_is_right(cli: Cli, model: Path, text: Path, change: Damage) -> None:
    change(model)
    if "num_nextn_predict_layers" in (model / "config.json").read_text():
        copied(QUERY, QUERY.replace(".0.", ".2."))(model)
    outcome = evaluated(cli, model, text)
    assert outcome.code == 0, outcome.err
    config(return_dict=True)(model)
    assert json.loads(outcome.out)["perplexity"] == pytest.approx(perplexity(model, text), rel=1e-4)
    assert prune(cli, model, text, "-s", 0.5).code == 0
    assert cli("inspect", model.parent / "out").code == 0
    assert evaluated(cli, model.parent / "out", text).code == 0


def test_a_tokenizer_of_another_model_is_refused(cli: Cli, model: Path, text: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].contiguous()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config(vocab_size=100)(model)
    for outcome in (cli("eval", model, "-d", text, "--context", 32), prune(cli, model, text, "-s", 0.5)):
        refused(outcome, "the model has 100: they do not belong together", model.parent)


def test_code_of_a_tokenizer_is_not_run(cli: Cli, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(text.parent)
    path = model / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["code.Own", None]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "Own", "auto_map": auto_map}))
    (model / "code.py").write_text("open('ran', 'w')\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    assert cli("eval", model, "-d", text, "--context", 32).code in (0, 2)
    assert not Path("ran").exists()


def test_only_the_model_travels(cli: Cli, model: Path, text: Path) -> None:
    shutil.copyfile(model / "model.safetensors", model / "consolidated.safetensors")
    (model / "consolidated.safetensors.index.json").write_text("{}")
    outcome = prune(cli, model, text, "-s", 0.5)
    assert outcome.code == 0
    assert "left out, not part of the model by its index: consolidated.safetensors" in outcome.err
    made = model.parent / "out"
    assert not list(made.glob("consolidated*"))
    assert cli("inspect", made).code == 0
    shutil.copyfile(made / "model.safetensors", made / "second.safetensors")
    assert "second.safetensors holds weights and does not belong to the model" in cli("inspect", made).err


def test_a_link_out_of_the_folder_is_not_copied(cli: Cli, model: Path, text: Path) -> None:
    (text.parent / "secret").write_text("secret")
    (model / "notes.txt").symlink_to(text.parent / "secret")
    refused(prune(cli, model, text, "-s", 0.5), "notes.txt is a link out of its folder", model.parent)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["files"].pop("model.safetensors"), "model.safetensors is not listed"),
        (lambda m: m["files"].update({"../away": "0" * 64}), "not a name inside its folder"),
        (lambda m: m["files"].update({"config.json": 3}), "'config.json' is a number"),
        (lambda m: m["plan"].update(sparsity=0.9), "the plan asks for 0.9"),
        (lambda m: m["plan"].update(pattern="2:4"), "the plan's is 2:4"),
        (lambda m: m["modules"].popitem(), "'modules' lacks model.layers"),
        (lambda m: m.update(format="1"), "'format' is a string"),
        (lambda m: m.update(modules=[]), "'modules' is a list"),
        (lambda m: m.pop("plan"), "lacks 'plan'"),
    ],
)
def test_an_edited_manifest_is_found(cli: Cli, model: Path, text: Path, edit: Damage, message: str) -> None:
    assert prune(cli, model, text, "-s", 0.5).code == 0
    path = model.parent / "out" / "sparsity.json"
    manifest = json.loads(path.read_text())
    edit(manifest)  # type: ignore[arg-type]
    path.write_text(json.dumps(manifest))
    outcome = cli("inspect", model.parent / "out")
    assert outcome.code == 2
    assert message in outcome.err
    assert "unexpected" not in outcome.err
