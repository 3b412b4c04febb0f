"""Training the reference model: deterministic, cached by content, whole or absent, usable like any checkpoint."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.models.fingerprint import file_sha256
from sparsedeploy.reference import cache, reference_model, train
from sparsedeploy.reference.corpus import Document, fingerprint, read_corpus
from sparsedeploy.reference.options import PRESETS, content_key, preset_options
from sparsedeploy.reference.tokenizer import train_tokenizer
from sparsedeploy.reference.train import batches, token_stream, train_reference

SHORT = replace(
    PRESETS["tiny"],
    name="short",
    hidden_size=64,
    intermediate_size=96,
    layers=2,
    heads=2,
    key_value_heads=1,
    vocab_size=300,
    context=64,
    batch_tokens=256,
    steps=12,
    warmup_steps=2,
)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """A small part of the corpus with all three splits in it."""
    return [document for document in read_corpus() if len(document.text) < 12_000][::4]


@pytest.fixture(scope="module")
def trained(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_reference(SHORT, documents, folder)
    return folder


def test_training_again_gives_the_same_bits_and_leaves_the_random_state(
    trained: Path, documents: list[Document], tmp_path: Path
) -> None:
    torch.manual_seed(123)  # whatever the caller's state is
    state = torch.get_rng_state()
    train_reference(SHORT, documents, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert file_sha256(tmp_path / name) == file_sha256(trained / name)


def test_another_seed_gives_other_weights(trained: Path, documents: list[Document], tmp_path: Path) -> None:
    train_reference(replace(SHORT, seed=1), documents, tmp_path)
    assert file_sha256(tmp_path / "model.safetensors") != file_sha256(trained / "model.safetensors")


def test_report_says_what_was_trained_and_how_good_it_is(trained: Path, documents: list[Document]) -> None:
    report = json.loads((trained / "reference.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert report["options"]["steps"] == SHORT.steps
    assert report["result"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    # Already better than guessing among the vocabulary, on text that it never saw.
    assert report["result"]["validation_loss"] < math.log(SHORT.vocab_size)
    assert report["result"]["validation_perplexity"] == pytest.approx(math.exp(report["result"]["validation_loss"]))


def test_folder_is_a_normal_float32_checkpoint(trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.num_attention_heads // model.config.num_key_value_heads == 2
    assert model.config.max_position_embeddings == SHORT.context
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    prompt = tokenizer("import os\n", return_tensors="pt")["input_ids"]
    text = model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert text.shape[1] > prompt.shape[1]


def test_batches_hold_the_stream_in_windows_that_grow(documents: list[Document]) -> None:
    tokenizer = train_tokenizer([document.text for document in documents], SHORT.vocab_size)
    stream = token_stream(tokenizer, ["a = 1\n", "b = 2\n" * 3000])
    assert stream[0] == tokenizer.bos_token_id
    assert stream[-1] == tokenizer.eos_token_id
    shapes = [tuple(batch.shape) for batch in batches(stream, SHORT)]
    assert len(shapes) == SHORT.steps
    assert shapes[0] == (16, 17)
    assert shapes[-1] == (4, 65)
    positions = torch.arange(len(stream))  # a stream whose tokens are their positions shows where windows start
    for batch in batches(positions, SHORT):
        assert torch.equal(batch, batch[:, :1] + torch.arange(batch.shape[1]))
        assert len(set(batch[:, 0].tolist())) == len(batch)


def test_key_changes_with_options_corpus_and_seed(documents: list[Document]) -> None:
    keys = {
        content_key(SHORT, "a"),
        content_key(SHORT, "b"),
        content_key(replace(SHORT, seed=1), "a"),
        content_key(replace(SHORT, steps=13), "a"),
        content_key(PRESETS["default"], "a"),
    }
    assert len(keys) == 5
    assert content_key(replace(SHORT), "a") == content_key(SHORT, "a")


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="default, tiny"):
        reference_model("huge")
    assert preset_options("tiny", 3).seed == 3


def test_cache_trains_once_and_again_on_request(
    documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(tmp_path))
    folder = cache.cached_reference(SHORT, documents)
    assert folder.parent == tmp_path / "reference"
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert cache.cached_reference(SHORT, documents) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert cache.cached_reference(SHORT, documents, refresh=True) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns > written
    assert cache.cached_reference(replace(SHORT, seed=1), documents) != folder


def test_interrupted_training_leaves_nothing(
    documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(tmp_path))

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    cached = tmp_path / "reference" / f"short-{content_key(SHORT, fingerprint(documents))}"
    killed = cached.with_name(f".{cached.name}.abc.tmp")  # what a killed process leaves behind
    killed.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr("sparsedeploy.reference.train.write_json", interrupt)  # the last thing that training does
        with pytest.raises(KeyboardInterrupt):
            cache.cached_reference(SHORT, documents)
    assert [path for path in (tmp_path / "reference").iterdir() if path.suffix != ".lock"] == []
    assert (cache.cached_reference(SHORT, documents) / "reference.json").is_file()  # and the lock is free again


def test_killed_training_resumes_bit_for_bit(
    trained: Path, documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    (tmp_path / "out").mkdir()
    seen: list[int] = []

    def killed(*arguments: object) -> Iterator[torch.Tensor]:
        for step, batch in enumerate(batches(*arguments)):  # type: ignore[arg-type]
            if step == 7:
                raise KeyboardInterrupt
            seen.append(step)
            yield batch

    monkeypatch.setattr(train, "_SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(train, "batches", killed)
        with pytest.raises(KeyboardInterrupt):
            train_reference(SHORT, documents, tmp_path / "out", state)
    assert seen == list(range(7))
    assert state.is_file()
    train_reference(SHORT, documents, tmp_path / "out", state)
    assert file_sha256(tmp_path / "out" / "model.safetensors") == file_sha256(trained / "model.safetensors")
    assert not state.exists()


@pytest.mark.parametrize("content", [b"", b"no training", b"PK\x03\x04"])
def test_damaged_saved_training_starts_over(
    content: bytes, trained: Path, documents: list[Document], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    state.write_bytes(content)
    progress.show()
    train_reference(SHORT, documents, tmp_path, state)
    progress.show(False)
    assert "is damaged: training starts over" in capsys.readouterr().err
    assert file_sha256(tmp_path / "model.safetensors") == file_sha256(trained / "model.safetensors")


def start_process(home: Path, documents: Sequence[Document]) -> subprocess.Popen[str]:
    """Another process that asks the cache for the same model and says whether it had to train it."""
    script = f"""
from sparsedeploy.reference import cache, train
from sparsedeploy.reference.corpus import read_corpus
from sparsedeploy.reference.options import ReferenceOptions
paths = {[document.path for document in documents]!r}
documents = [document for document in read_corpus() if document.path in paths]
real, calls = train.train_reference, []
train.train_reference = lambda *arguments: (calls.append(1), real(*arguments))
folder = cache.cached_reference({SHORT!r}, documents)
print(len(calls), folder)
"""
    environment = {**os.environ, "SPARSEDEPLOY_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)


def test_concurrent_processes_train_it_once(documents: list[Document], tmp_path: Path) -> None:
    processes = [start_process(tmp_path, documents) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(output[0] for output in outputs) == ["0", "1"]
    assert outputs[0][1] == outputs[1][1]
    assert (Path(outputs[0][1]) / "reference.json").is_file()
