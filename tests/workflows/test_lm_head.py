"""``--lm-head``: the output head is pruned like one more layer, on what the final norm gives it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, OPTConfig

import sparsedeploy
from sparsedeploy import CalibrationOptions, PruneOptions, UserError
from sparsedeploy.artifacts.folder import describe_folder
from sparsedeploy.calibration.text import recorded_tokens
from sparsedeploy.checkpoint.inspection import inspect_checkpoint
from sparsedeploy.checkpoint.manifest import load_manifest
from sparsedeploy.checkpoint.masks import FILE as MASKS
from sparsedeploy.checkpoint.masks import load_masks
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.registry import ALLOCATORS, PRUNERS
from sparsedeploy.targets.registry import export_checkpoint
from sparsedeploy.workflows.options import RecoverOptions, RunOptions
from sparsedeploy.workflows.prune import prune
from sparsedeploy.workflows.recover import prune_and_recover
from tests.cli.conftest import Outcome, cli  # noqa: F401 - a fixture
from tests.small_models import VOCABULARY, byte_tokenizer, random_model, save_model

HEAD = "lm_head"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "dense", num_hidden_layers=3)


def options(text: Path, **changes: object) -> PruneOptions:
    calibration = CalibrationOptions(data=str(text), sequences=3, length=24, accumulate="float64")
    values = {"sparsity": 0.5, "method": "wanda", "lm_head": True, "calibration": calibration, **changes}
    return PruneOptions(**values)


def masks_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_masks(folder / MASKS, {t.name: t.columns for t in load_manifest(folder).plan.targets})


def head_inputs(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """What transformers' own forward pass gives to the head, ``[tokens, columns]``."""
    found: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: found.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for row in tokens:
            model(input_ids=row[None], use_cache=False)
    handle.remove()
    return torch.cat(found)


def wanda_mask(weight: torch.Tensor, inputs: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Of each row the smallest |W| * norm are dropped, ties by index."""
    scores = weight.double().abs() * inputs.double().square().sum(dim=0).sqrt()
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.scatter(1, scores.argsort(dim=1, stable=True)[:, : round(sparsity * weight.shape[1])], False)


def with_final_norm(folder: Path, family: str) -> Path:
    """A model whose final norm changes which inputs of the head are large."""
    if family == "opt":  # its head reads a projection of the hidden states
        torch.manual_seed(0)
        config = OPTConfig(
            vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=16, tie_word_embeddings=False, max_position_embeddings=64, do_layer_norm_before=False,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
    elif family == "gpt_neox":  # stored as embed_out
        torch.manual_seed(0)
        config = GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, tie_word_embeddings=False,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = random_model(family, tie_word_embeddings=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and "layers.0" not in name and name.endswith("weight"):
                parameter.mul_(torch.rand(parameter.shape) * 4)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt_neox"])
def test_wanda_scores_the_head_by_what_the_model_gives_it(family: str, text: Path, tmp_path: Path) -> None:
    dense, output = with_final_norm(tmp_path / "dense", family), tmp_path / "pruned"
    manifest = prune(str(dense), output, options(text))
    names = [target.name for target in manifest.plan.targets]
    head = names[-1]
    assert head == HEAD
    pruned, whole = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (output, dense))
    weight = whole.get_submodule(head).weight.data
    inputs = head_inputs(pruned, recorded_tokens(byte_tokenizer(), whole.config, manifest))
    mask = masks_of(output)[head]
    assert torch.equal(mask, wanda_mask(weight, inputs, 0.5))
    assert torch.equal(pruned.get_submodule(head).weight.data, weight * mask)
    assert not torch.equal(mask, wanda_mask(weight, torch.ones_like(inputs), 0.5)), "inputs count"
    assert inspect_checkpoint(output).problems == []


@pytest.mark.parametrize("method", PRUNERS.names())
def test_every_method_prunes_it_within_the_budget(method: str, model: Path, text: Path, tmp_path: Path) -> None:
    manifest = prune(str(model), tmp_path / "p", options(text, method=method, sparsity=0.6))
    assert manifest.plan.has_head
    unit = max(target.rows for target in manifest.plan.targets)
    size = sum(target.size for target in manifest.plan.targets)
    weights = sum(p.numel() for name, p in random_model("llama", num_hidden_layers=3).named_parameters() if p.dim() > 1)
    assert size == weights - VOCABULARY * 32  # everything but the embedding
    assert abs(manifest.achieved - 0.6) * size <= unit
    stored = load_file(tmp_path / "p" / "model.safetensors")[f"{HEAD}.weight"]
    assert not stored[~masks_of(tmp_path / "p")[HEAD]].any()
    assert inspect_checkpoint(tmp_path / "p").problems == []
    assert describe_folder(tmp_path / "p").sparsity.weights == size


@pytest.mark.parametrize("allocation", [name for name in ALLOCATORS.names() if name not in ("auto", "evolve")])
def test_every_allocation_gives_it_a_rate(allocation: str, model: Path, text: Path, tmp_path: Path) -> None:
    manifest = prune(str(model), tmp_path / "p", options(text, method="magnitude", allocation=allocation))
    head = manifest.plan.by_name[HEAD]
    assert 0 < head.sparsity < 1
    size = sum(target.size for target in manifest.plan.targets)
    assert abs(manifest.achieved - 0.5) * size <= max(target.rows for target in manifest.plan.targets)


@pytest.mark.parametrize("changes", [{"pattern": "2:4", "sparsity": None}, {"quantize": "int8"}, {"reconstruct": True}])
def test_patterns_rounding_and_reconstruction(changes: dict, model: Path, text: Path, tmp_path: Path) -> None:
    manifest = prune(str(model), tmp_path / "p", options(text, **changes))
    assert manifest.plan.by_name[HEAD].sparsity == 0.5
    assert inspect_checkpoint(tmp_path / "p").problems == []


def test_a_search_and_memory_and_a_plan_do_the_same(model: Path, text: Path, tmp_path: Path, cli) -> None:  # noqa: F811
    words = ("prune", model, "-s", "0.5", "--lm-head", "--data", text, "-n", "3", "--calibration-length", "24")
    words += ("-m", "wanda")
    search = ("-a", "auto", "--allocation-option", f"database={tmp_path / 'db'}", "--allocation-option")
    found = cli(*words, "-o", tmp_path / "searched", *search, f"text={text}")
    assert found.code == 0, found.err
    plan = load_manifest(tmp_path / "searched").plan
    assert plan.has_head
    assert (tmp_path / "db" / HEAD).is_dir()
    path = tmp_path / "plan.json"
    plan.save(path)
    again = cli("prune", model, "-o", tmp_path / "planned", "--plan", path, *words[5:])
    assert again.code == 0, again.err
    assert load_manifest(tmp_path / "planned").request["prune"]["lm_head"] is True
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("searched", "planned"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    refused = cli("prune", model, "-o", tmp_path / "x", "--plan", path, "--lm-head", *words[5:])
    assert refused.code == 2
    assert "--lm-head" in refused.err
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    pruned = sparsedeploy.prune(loaded, options(text, plan=plan), byte_tokenizer())
    pruned.save(tmp_path / "memory")
    assert torch.equal(pruned.masks[HEAD], masks_of(tmp_path / "planned")[HEAD])
    assert inspect_checkpoint(tmp_path / "memory").problems == []


def test_interrupted_before_the_head_it_resumes_the_same(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(str(model), tmp_path / "whole", options(text, method="sparsegpt"))
    from sparsedeploy.checkpoint.journal import Journal

    record = Journal.record_layer

    def cut(self: Journal, index: int, losses: dict[str, float]) -> None:
        if index == 3:
            raise KeyboardInterrupt
        record(self, index, losses)

    monkeypatch.setattr(Journal, "record_layer", cut)
    with pytest.raises(KeyboardInterrupt):
        prune(str(model), tmp_path / "cut", options(text, method="sparsegpt"))
    monkeypatch.undo()
    assert not (tmp_path / "cut").exists()
    prune(str(model), tmp_path / "cut", options(text, method="sparsegpt"), RunOptions(resume=True))
    for name in ("model.safetensors", MASKS):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_cannot_be(model: Path, text: Path, tmp_path: Path) -> None:
    tied = save_model(tmp_path / "tied", "gemma")
    assert json.loads((tied / "config.json").read_text()).get("tie_word_embeddings", True)
    with pytest.raises(
        UserError, match=r"lm_head of GemmaForCausalLM is tied to the embedding.*Leave out --lm-head; or give"
    ):
        prune(str(tied), tmp_path / "p", options(text))
    with pytest.raises(UserError, match="does not keep a pruned output head sparse"):
        prune_and_recover(str(model), tmp_path / "p", options(text), RecoverOptions())
    assert not (tmp_path / "p").exists()


def test_by_default_the_head_stays_dense(model: Path, text: Path, tmp_path: Path) -> None:
    manifest = prune(str(model), tmp_path / "p", options(text, lm_head=False))
    assert not manifest.plan.has_head
    one, two = (load_file(folder / "model.safetensors")[f"{HEAD}.weight"] for folder in (model, tmp_path / "p"))
    assert torch.equal(one, two)
    assert find_decoder_stack(AutoModelForCausalLM.from_pretrained(model)).head is None


def test_exports_count_it_or_refuse(model: Path, text: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:  # noqa: F811
    checkpoint = tmp_path / "p"
    size = prune(str(model), checkpoint, options(text, method="sparsegpt")).plan
    weights, zeros = sum(t.size for t in size.targets), sum(t.zeros for t in size.targets)
    found = export_checkpoint(checkpoint, "deepsparse", tmp_path / "ds", {}).sparsity
    assert (found.weights, found.zeros) == (weights, zeros)
    integers = export_checkpoint(checkpoint, "deepsparse", tmp_path / "int8", {"int8": "true", "windows": "0"}).sparsity
    assert integers.weights == weights
    assert integers.zeros >= zeros
    packed = export_checkpoint(checkpoint, "vllm", tmp_path / "vllm", {})
    head = size.by_name[HEAD]
    assert packed.sparsity.weights == weights - head.size
    stored = load_file(tmp_path / "vllm" / "model.safetensors")[f"{HEAD}.weight"]
    assert torch.equal(stored, load_file(checkpoint / "model.safetensors")[f"{HEAD}.weight"])
    with pytest.raises(UserError, match="this checkpoint's output head is pruned, too"):
        export_checkpoint(checkpoint, "llmcompressor", tmp_path / "lc", {})
    assert "The output head, which was pruned too" in (checkpoint / "recipe.yaml").read_text()
    assert cli("inspect", checkpoint).code == 0
    assert cli("inspect", checkpoint, "--against", model).code == 0


@pytest.mark.engine
@pytest.mark.parametrize("target", ["onnxruntime", "llamacpp"])
def test_engines_keep_its_zeros(target: str, model: Path, text: Path, tmp_path: Path) -> None:
    from sparsedeploy.runtimes.environments import require

    try:
        require(target)
    except UserError as error:
        pytest.skip(str(error))
    plan = prune(str(model), tmp_path / "p", options(text)).plan
    found = export_checkpoint(tmp_path / "p", target, tmp_path / "out", {}).sparsity
    weights, zeros = sum(t.size for t in plan.targets), sum(t.zeros for t in plan.targets)
    assert found.weights == weights
    assert found.zeros >= zeros
