"""The target llamacpp: whole models by llama.cpp itself, with packed weights and with its own dense kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.artifacts.known_answer import load_known_answer
from sparsedeploy.errors import UserError
from sparsedeploy.runtimes.engine import open_model
from sparsedeploy.runtimes.environments import Environment
from sparsedeploy.runtimes.llamacpp import build_of, offer
from sparsedeploy.runtimes.options import EngineOptions, ServeOptions
from sparsedeploy.runtimes.serving import serve
from sparsedeploy.targets.gguf_codes import layouts
from sparsedeploy.targets.registry import export_checkpoint
from tests.formats.test_transformers import save_sparse_model
from tests.runtimes.artifacts import refresh
from tests.small_models import byte_tokenizer, save_model

pytestmark = [pytest.mark.llamacpp, pytest.mark.slow, pytest.mark.xdist_group("llamacpp")]

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
PROMPT = [(7 * i + 3) % 250 for i in range(24)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped-query attention, no biases."""
    return sparse_model(tmp_path_factory.mktemp("llama") / "model", "llama")


def sparse_model(folder: Path, family: str, **changes: object) -> Path:
    """Weights of which seven tenths are zero, large enough that greedy tokens are not a matter of rounding."""
    save_model(folder, family, **SIZES, max_position_embeddings=1024, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator)
        elif ".layers." in name and parameter.dim() == 2:
            keep = torch.rand(parameter.shape, generator=generator) < 0.3
            parameter.data = torch.randn(parameter.shape, generator=generator) * keep * 0.2
        elif parameter.dim() == 2:
            parameter.data *= 20
    model.save_pretrained(folder)
    return folder


# 8-bit and 4-bit weights meet activations rounded to 8 bits: the smallest difference moves roundings, so that two right
# programs differ by as much as each of them from exact arithmetic.
@pytest.mark.parametrize("quantize", [None, "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("case", ["llama", "qwen2", "tied"])
def test_same_tokens_packed_and_dense(
    case: str, quantize: str | None, runtime: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = "qwen2" if case == "qwen2" else "llama"  # Qwen2 has biases
    # transformers adds tokens of its own to Qwen2's tokenizer.
    more = {"vocab_size": 320} if case == "qwen2" else {}
    folder = sparse_model(tmp_path / "model", family, tie_word_embeddings=case == "tied", **more)
    artifact = export_checkpoint(folder, "llamacpp", tmp_path / "out", {"quantize": quantize})
    assert artifact.check is not None
    # Rounding to 4 bits makes some more of them zero.
    assert 0.68 <= artifact.sparsity.fraction <= (0.76 if quantize == "q4_0" else 0.72)
    assert artifact.dtype == (quantize or "f32")
    assert load_artifact(tmp_path / "out", verify=True) == artifact
    results = []
    for pack in ("never", "always"):
        monkeypatch.setenv("SPARSEDEPLOY_PACK", pack)
        for cores in (1, 2):
            with open_model(tmp_path / "out", prompt_length=512, new_tokens=32, cores=cores) as model:
                tokens = results[0][0] if results else list(model.generate(PROMPT, 32))
                results.append((tokens, *model.logits(PROMPT * 21, PROMPT[:4]), *model.logits(PROMPT, tokens[:-1])))
    tokens, *dense = results[0]
    tolerance = (1e-2 if quantize in (None, "f16") else 5e-2) * np.abs(dense[0]).max()
    for _, *others in results[1:]:
        for found, wanted in zip(others, dense, strict=True):
            assert np.sqrt(np.mean((found - wanted) ** 2)) <= tolerance / 3
        # Each greedy token of the dense kernels is one of the packed ones too, up to a tie within the tolerance.
        steps = np.concatenate([others[2][-1:], others[3]])
        assert (steps.max(1) - steps[np.arange(len(tokens)), tokens]).max() <= tolerance


def test_a_float32_file_by_a_relative_name(
    llama: Path, runtime: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    artifact = export_checkpoint(llama, "llamacpp", Path("out"))
    assert artifact.dtype == "f32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("quantize", ["f16", "q8_0", "q4_0"])
def test_one_wrong_weight_matrix_is_refused(llama: Path, runtime: Environment, tmp_path: Path, quantize: str) -> None:
    """Rows one further down: the check after loading allows what rounding activations makes, and no more."""
    test = export_checkpoint(llama, "llamacpp", tmp_path / "out", {"quantize": quantize}).self_test
    assert test is not None
    assert 0 < load_known_answer(tmp_path / "out", test).spread.mean() < (0.01 if quantize == "f16" else 0.2)
    sizes = {"prompt_length": 80, "new_tokens": 8, "cores": 1}
    with open_model(tmp_path / "out", **sizes):
        pass
    command = [sys.executable, str(runtime.runtime.folder / "gguf_tool.py"), "layout", str(build_of(runtime).source)]
    file = tmp_path / "out" / "model.gguf"
    said = subprocess.run([*command, str(file)], capture_output=True, text=True, check=True).stdout
    found = layouts(json.loads(said.strip().rpartition("\n")[2])[0])["blk.1.attn_output.weight"]
    rows = np.memmap(file, np.uint8, "r+", found.start, (found.shape[-2], found.size // found.shape[-2]))
    rows[:] = np.roll(rows, 1, axis=0)
    rows.flush()
    with pytest.raises(UserError, match=r"model\.gguf was changed"), open_model(tmp_path / "out", **sizes):
        pass
    with (
        pytest.raises(UserError, match=r"llama\.cpp computes .* wrongly on this machine"),
        open_model(refresh(tmp_path / "out"), **sizes),
    ):
        pass


def test_pruned_model_equals_transformers(llama: Path, runtime: Environment, tmp_path: Path) -> None:
    export_checkpoint(llama, "llamacpp", tmp_path / "out")
    reference = AutoModelForCausalLM.from_pretrained(llama)
    wanted = reference.generate(torch.tensor([PROMPT]), max_new_tokens=32, do_sample=False, eos_token_id=None)
    with open_model(tmp_path / "out", prompt_length=len(PROMPT), new_tokens=32) as model:
        assert list(model.generate(PROMPT, 32)) == wanted[0, len(PROMPT) :].tolist()


def session_tokens(path: Path) -> tuple[int, ...]:
    """The tokens of a session file: magic, version and their number come before them, four bytes each.

    What the program prints may be cut off: it does not wait for its printing thread.
    """
    words = np.fromfile(path, np.uint32, 3)
    return tuple(np.fromfile(path, np.int32, int(words[2]), offset=12).tolist())


def test_programs_of_the_build_take_the_backend(llama: Path, runtime: Environment, tmp_path: Path) -> None:
    """llama-completion chooses the same tokens with and without the backend; both ways, mapped and read.

    In float32: with 8-bit activations a random model's ties fall either way.
    """
    export_checkpoint(llama, "llamacpp", tmp_path / "out")
    build = build_of(runtime)
    options = ["--temp", "0", "-n", "16", "-t", "1", "-no-cnv", "--no-warmup", "-p", "Once upon", "--ignore-eos"]
    command = [str(build.program("llama-completion")), "-m", str(tmp_path / "out" / "model.gguf"), *options]
    said = []
    own = {"GGML_BACKEND_PATH": str(build.backend)}
    device = {**own, "SPARSEDEPLOY_LLAMACPP": "device"}
    for more, variables in (
        ((), {}),
        (("--verbosity", "4", *offer()), own),
        (offer(), device),
        (("--load-mode", "none", *offer()), own),
        (("--load-mode", "none", *offer()), device),
    ):
        session = tmp_path / f"{len(said)}.session"
        kept = ["--prompt-cache", str(session), "--prompt-cache-all"]
        done = subprocess.run(
            [*command, *kept, *more], env={**os.environ, **variables}, capture_output=True, check=True, timeout=120
        )
        said.append(session_tokens(session))
        if "--verbosity" in more:
            assert b"sparsedeploy: packed 14 tensors" in done.stderr
    prompt = byte_tokenizer()("Once upon")["input_ids"]
    assert said[0][: len(prompt)] == tuple(prompt)
    assert len(said[0]) >= len(prompt) + 15, "all but perhaps the last of 16 new tokens"
    assert len(set(said)) == 1


def test_server_answers_and_streams(llama: Path, runtime: Environment, tmp_path: Path) -> None:
    export_checkpoint(llama, "llamacpp", tmp_path / "out", {"quantize": "q8_0"})
    with serve(tmp_path / "out", ServeOptions(port=0, length=128), EngineOptions(cores=1)) as served:
        body = {"model": "model", "prompt": "Once upon", "max_tokens": 8, "temperature": 0}
        whole = json.loads(post(served.url, body))["choices"][0]["text"]
        lines = post(served.url, {**body, "stream": True}).splitlines()
        events = [line[6:] for line in lines if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == whole
        assert "sparsedeploy: packed 14 tensors" in served.log.read_text(errors="replace")


def test_server_computes_requests_at_once(llama: Path, runtime: Environment, tmp_path: Path) -> None:
    """Several prompts at once get the answers that each gets alone, and each has room for the whole length."""
    export_checkpoint(llama, "llamacpp", tmp_path / "out", {"quantize": "q8_0"})
    prompts = [f"{word} upon" for word in ("Once", "Here", "What", "Nine", "Both")]
    answers = []
    for parallel in (1, 3):
        options = ServeOptions(port=0, length=64, parallel=parallel)
        with (
            serve(tmp_path / "out", options, EngineOptions(cores=1)) as served,
            ThreadPoolExecutor(len(prompts)) as clients,
        ):
            bodies = [{"model": "model", "prompt": prompt, "max_tokens": 48, "temperature": 0} for prompt in prompts]
            found = [json.loads(each) for each in clients.map(lambda body: post(served.url, body), bodies)]
            answers.append([each["choices"][0]["text"] for each in found])
            log = served.log.read_text(errors="replace")
            assert f"n_slots = {parallel}" in log
    assert answers[0] == answers[1]


def post(url: str, body: dict[str, object]) -> str:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: str = answer.read().decode()
    return text


def test_several_sequences_at_once(llama: Path, runtime: Environment, tmp_path: Path) -> None:
    export_checkpoint(llama, "llamacpp", tmp_path / "out", {"quantize": "q8_0"})
    with open_model(tmp_path / "out", prompt_length=24, new_tokens=8, batch=8) as model:
        timing = model.measure(PROMPT, 4, batch=8)
    assert timing.prefill_seconds > 0
    assert len(timing.decode_seconds) == 4


def test_tokenizer_that_llama_cpp_does_not_have(llama: Path, runtime: Environment, tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    folder = save_sparse_model(tmp_path / "model", "llama", torch.float32, **SIZES)
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"llama.cpp cannot convert .*splits text"):
        export_checkpoint(folder or tmp_path / "model", "llamacpp", tmp_path / "out")
    assert not (tmp_path / "out").exists()
