"""What a model changes beyond a length is reached by the export check, or refused with a remedy that works."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config, PretrainedConfig

from sparsedeploy.errors import UserError
from sparsedeploy.runtimes.environments import require
from sparsedeploy.targets.check import check_graph, reference_logits
from sparsedeploy.targets.kv_graph import KVCacheGraph
from sparsedeploy.targets.onnx_file import write_onnx
from sparsedeploy.targets.registry import export_checkpoint
from sparsedeploy.targets.switches import check_length, switches
from tests.family_configs import small_config
from tests.small_models import byte_tokenizer, config_of
from tests.targets.graphs import GraphRunner, open_graph, random_tokens

SWITCH = 64


def phi3() -> PretrainedConfig:
    """Phi-3's longrope: other frequencies beyond 64 of its 128 positions."""
    return Phi3Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,  # Optimum assumes as many as heads
        max_position_embeddings=2 * SWITCH,
        original_max_position_embeddings=SWITCH,
        initializer_range=0.15,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": SWITCH,
            "short_factor": [1.0, 1.0, 1.1, 1.2],
            "long_factor": [4.0, 5.0, 6.0, 8.0],
        },
    )


def dynamic() -> PretrainedConfig:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return config_of("llama", initializer_range=0.15, max_position_embeddings=SWITCH, rope_parameters=rope)


def save(config: PretrainedConfig, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("target", ["deepsparse", "onnxruntime"])
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_frequencies_that_follow_the_length(kind: str, target: str, tmp_path: Path) -> None:
    if target == "onnxruntime":
        try:
            require("onnxruntime")
        except UserError as error:
            pytest.skip(str(error))
    model = save(phi3() if kind == "longrope" else dynamic(), tmp_path / "model")
    remedy = rf"change beyond {SWITCH} tokens. .*--target-option max_positions={SWITCH}"
    with pytest.raises(UserError, match=remedy):
        export_checkpoint(tmp_path / "model", target, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="positions"):
        export_checkpoint(tmp_path / "model", target, tmp_path / "out", {"max_positions": str(4 * SWITCH)})
    # The remedy works, up to the last position that it is for.
    artifact = export_checkpoint(tmp_path / "model", target, tmp_path / "out", {"max_positions": str(SWITCH)})
    assert artifact.shapes.max_positions == SWITCH
    assert artifact.check is not None
    assert artifact.check.tokens == SWITCH
    if target == "deepsparse":
        tokens = random_tokens(1, SWITCH)
        runner = GraphRunner(open_graph(tmp_path / "out" / "model.onnx"), batch=1)
        found = torch.cat([runner.step(tokens[:, :50]), runner.step(tokens[:, 50:])], dim=1)
        expected = model(tokens, use_cache=False).logits
        assert np.abs((found - expected).numpy()).max() < 5e-5


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_window_far_into_the_text_is_reached(family: str, tmp_path: Path) -> None:
    config = config_of(family, initializer_range=0.15)
    config.sliding_window = 84
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    reference = reference_logits(model)
    assert reference.tokens.shape[1] > 84
    assert {*range(74), 83, 84, 85} <= set(reference.rows.tolist())
    graph = KVCacheGraph(model)
    (tmp_path / "right").mkdir()
    write_onnx(graph, tmp_path / "right")
    check = check_graph(tmp_path / "right" / "model.onnx", reference)
    assert check is not None
    assert check.largest_difference < 5e-5
    graph.window = 128
    (tmp_path / "wrong").mkdir()
    write_onnx(graph, tmp_path / "wrong")
    with pytest.raises(UserError, match="does not compute what the model computes"):
        check_graph(tmp_path / "wrong" / "model.onnx", reference)


def test_a_switch_too_far_for_a_check_is_refused_with_a_remedy() -> None:
    config = config_of("mistral", max_position_embeddings=40_000)
    config.sliding_window = 20_000
    with pytest.raises(UserError, match=r"beyond 20000 tokens \(sliding_window\), .*max_positions=20000"):
        check_length("Mistral", config, 40_000)
    assert check_length("Mistral", config, 20_000) == 74
    config.sliding_window = 4096
    assert check_length("Mistral", config, 40_000) == 4104


def test_queries_that_are_scaled_by_their_position(tmp_path: Path) -> None:
    """Ministral 3: the scale grows by steps of 64 tokens, which the check crosses; one too far is refused."""
    config = small_config("ministral3")
    assert switches(config)["llama_4_scaling_beta"] == SWITCH
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    reference = reference_logits(model)
    assert reference.tokens.shape[1] > SWITCH
    config.rope_parameters["original_max_position_embeddings"] = 16384
    with pytest.raises(UserError, match=r"beyond 16384 tokens \(llama_4_scaling_beta\), .*max_positions=16384"):
        check_length("Ministral 3", config, 40_000)


def test_fields_that_are_lengths() -> None:
    qwen = config_of("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    assert switches(qwen) == {"sliding_window": 16}
    assert switches(config_of("llama")) == {}
    full = config_of("qwen3", sliding_window=16)
    full.layer_types = ["full_attention", "full_attention"]
    assert switches(full) == {}
    full.attention_chunk_size = 32
    assert switches(full) == {}
    full.layer_types = ["chunked_attention", "full_attention"]
    assert switches(full) == {"attention_chunk_size": 32}
