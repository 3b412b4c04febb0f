"""The same logits and the same text from torch, ONNX Runtime and DeepSparse, with the key/value cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from transformers import PreTrainedModel
from typer.testing import CliRunner

from sparsedeploy.artifacts.description import ARTIFACT_FILE, load_artifact
from sparsedeploy.cli.generate import generate_command
from sparsedeploy.errors import UserError
from sparsedeploy.runtimes.engine import open_model
from sparsedeploy.runtimes.environments import Environment
from sparsedeploy.targets import deepsparse
from tests.runtimes.artifacts import refresh
from tests.runtimes.exported import Exported, export_small
from tests.targets.graphs import GraphRunner, open_graph, random_tokens

pytestmark = pytest.mark.engine

# The logits are a few units; rounding in another order moves them by some 1e-6, a wrong mask or position by units.
TOLERANCE = 5e-5
PRUNED = ("mistral", "qwen2", "qwen3", "opt", "gemma", "gemma2", "gemma3")


@pytest.fixture(scope="module", params=[0.0, 0.8], ids=["dense", "pruned"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_small(tmp_path_factory.mktemp("llama"), "llama", request.param)


def torch_logits(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def torch_greedy(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> list[int]:
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new_tokens}
    return model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()


@pytest.mark.usefixtures("deepsparse_runtime")
@pytest.mark.parametrize(
    ("prompt", "new_tokens", "chunk"),
    [
        (11, 20, 4),  # three chunks, the first one padded
        (16, 3, 16),  # one whole chunk, and a cache as small as the chunk allows
        (3, 30, 16),  # a prompt shorter than its chunk
        (7, 5, 1),  # token by token
        (48, 8, 16),  # several whole chunks and few tokens after them
        (56, 12, 8),  # past the engine's first block of the cache while decoding
        (60, 60, 16),  # and while reading and decoding
        (33, 9, None),  # the chunk that is chosen without being asked for
    ],
)
def test_logits_and_greedy_tokens_of_three_engines(
    llama: Exported, prompt: int, new_tokens: int, chunk: int | None
) -> None:
    tokens = random_tokens(1, prompt + new_tokens)
    ids = tokens[0].tolist()
    expected = torch_logits(llama.model, ids)
    runner = GraphRunner(open_graph(llama.folder / "model.onnx"), batch=1)
    steps = [runner.step(tokens[:, :prompt]), *(runner.step(tokens[:, at : at + 1]) for at in range(prompt, len(ids)))]
    assert np.abs(torch.cat(steps, dim=1)[0].numpy() - expected).max() < TOLERANCE

    with open_model(llama.folder, prompt_length=prompt, new_tokens=new_tokens, cores=1, chunk=chunk) as model:
        prefill, decode = model.logits(ids[:prompt], ids[prompt:])
        assert (len(prefill), len(decode)) == (prompt, new_tokens)
        assert np.abs(prefill - expected[:prompt]).max() < TOLERANCE
        assert np.abs(decode - expected[prompt:]).max() < TOLERANCE
        assert list(model.generate(ids[:prompt], new_tokens, 0.0, 0, [])) == torch_greedy(
            llama.model, ids[:prompt], new_tokens
        )
        # Nothing of the runs before is left in the cache.
        again, _ = model.logits(ids[:prompt], [])
        assert np.array_equal(again, prefill)
    load_artifact(llama.folder, verify=True)


@pytest.mark.usefixtures("deepsparse_runtime")
@pytest.mark.parametrize("family", PRUNED)
def test_families(family: str, tmp_path: Path) -> None:
    exported = export_small(tmp_path, family, 0.8)
    # Longer than the sliding windows of 16 tokens.
    ids = random_tokens(1, 40)[0].tolist()
    expected = torch_logits(exported.model, ids)
    with open_model(exported.folder, prompt_length=22, new_tokens=18, cores=1, chunk=8) as model:
        prefill, decode = model.logits(ids[:22], ids[22:])
    assert np.abs(np.concatenate([prefill, decode]) - expected).max() < TOLERANCE


@pytest.mark.usefixtures("deepsparse_runtime")
def test_weights_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepsparse, "LARGEST_SINGLE_FILE", 0)
    exported = export_small(tmp_path, "llama", 0.5)
    assert (exported.folder / "model.data").is_file()
    ids = random_tokens(1, 12)[0].tolist()
    with open_model(exported.folder, prompt_length=8, new_tokens=4, cores=1) as model:
        prefill, decode = model.logits(ids[:8], ids[8:])
    assert np.abs(np.concatenate([prefill, decode]) - torch_logits(exported.model, ids)).max() < TOLERANCE
    load_artifact(exported.folder, verify=True)


@pytest.mark.usefixtures("deepsparse_runtime")
def test_text_of_the_command_equals_transformers(llama: Exported) -> None:
    app = typer.Typer()
    app.command()(generate_command)
    arguments = [str(llama.folder), "def main(", "--max-new-tokens", "24", "-c", "1"]
    plain = CliRunner().invoke(app, arguments, catch_exceptions=False)
    printed = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    prompt = torch.tensor([printed["prompt_tokens"]])
    settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": 257, "pad_token_id": 258}
    expected = llama.model.generate(prompt, **settings)[0, prompt.shape[1] :].tolist()
    assert printed["tokens"] == expected
    assert plain.stdout == printed["text"] + "\n"


@pytest.mark.usefixtures("deepsparse_runtime")
def test_sampling_and_stop_tokens(llama: Exported) -> None:
    prompt = random_tokens(1, 8)[0].tolist()
    with open_model(llama.folder, prompt_length=8, new_tokens=12, cores=1) as model:
        greedy = list(model.generate(prompt, 12, 0.0, 0, []))
        stop = greedy[3]
        assert list(model.generate(prompt, 12, 0.0, 0, [stop])) == greedy[: greedy.index(stop) + 1]
        drawn = [list(model.generate(prompt, 12, 1.5, seed, [])) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert list(model.generate(prompt, 12, 1e-4, 3, [])) == greedy
        with pytest.raises(UserError, match="8 prompt tokens and 57 new ones do not fit into a cache of 65 slots"):
            list(model.generate(prompt, 57, 0.0, 0, []))
        with pytest.raises(UserError, match="the prompt is empty"):
            model.logits([], [1])


@pytest.mark.usefixtures("deepsparse_runtime")
def test_graphs_that_are_truncated_or_none(llama: Exported, tmp_path: Path) -> None:
    """Without hashes, as in a folder of another program; with them, the file is named before the engine starts."""
    folder = shutil.copytree(llama.folder, tmp_path / "broken")
    graph = folder / "model.onnx"
    whole = graph.read_bytes()
    for content in (whole[: len(whole) // 2], b"not a graph"):
        graph.write_bytes(content)
        for description, message in (
            ({}, r"model\.onnx was changed since the export or is damaged"),
            ({"files": {}}, r"deepsparse: .*model\.onnx is not a whole ONNX graph"),
        ):
            (folder / ARTIFACT_FILE).write_bytes((llama.folder / ARTIFACT_FILE).read_bytes())
            with (
                pytest.raises(UserError, match=message + r".*\. Copy the folder again, or export") as caught,
                open_model(refresh(folder, **description) if description else folder, prompt_length=4, new_tokens=4),
            ):
                pass
            assert "\n" not in str(caught.value)


def test_engine_checks_itself(deepsparse_runtime: Environment) -> None:
    with deepsparse_runtime.worker() as worker:
        report = worker.call("check")
    assert report["versions"]["deepsparse"] == "1.8.0"
    assert report["largest_difference"] < 1e-4
    assert report["hardware"]["instruction_set"] in ("avx2", "avx512")
