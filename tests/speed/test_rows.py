"""What a benchmark concludes from given samples."""

from __future__ import annotations

from sparsedeploy.speed.layer_profile import by_kind, by_part, least_of_runs
from sparsedeploy.speed.rows import Sample, Setting, judge_noise

SETTING = Setting(1, 8, 1)


def samples(name: str, times: list[float]) -> list[Sample]:
    return [Sample(name, SETTING, at, 0, time / 2, [time / 4, time / 4]) for at, time in enumerate(times)]


def test_seconds_of_a_phase() -> None:
    one = Sample("a", SETTING, 0, 0, 4.0, [1.0, 3.0, 2.0])
    assert [one.seconds(phase) for phase in ("prefill", "decode", "total")] == [4.0, 2.0, 10.0]


def test_steady_machine() -> None:
    noise = judge_noise(SETTING, samples("a", [1.0, 1.01, 0.99, 1.0, 1.02, 5.0]))
    assert noise is not None
    assert noise.too_noisy is False
    assert noise.variation < 0.03


def test_too_noisy_by_spread_or_by_drift() -> None:
    spread = judge_noise(SETTING, samples("a", [1.0, 1.5, 0.7, 1.4, 0.8, 1.2]))
    drift = judge_noise(SETTING, samples("a", [1.0, 1.0, 1.0, 1.2, 1.2, 1.2]))
    assert spread is not None
    assert drift is not None
    assert spread.too_noisy is True
    assert drift.too_noisy is True
    assert 0.19 < drift.drift < 0.21


def test_few_rounds_cannot_tell_and_no_samples_say_nothing() -> None:
    few = judge_noise(SETTING, samples("a", [1.0, 2.0]))
    assert few is not None
    assert few.too_noisy is None
    assert judge_noise(Setting(2, 8, 1), samples("a", [1.0])) is None


def operator(node: str, ms: float, weights: int = 0, zeros: int = 0, kind: str = "mul") -> dict[str, object]:
    sparse = zeros > 0
    return {"node": node, "kind": kind, "ms": ms, "weights": weights, "zeros": zeros, "sparse_kernel": sparse}


def test_operators_by_layer_and_kind() -> None:
    operators = [
        operator("/model/embed_tokens/Gather", 1.0, kind="gather"),
        operator("/model/layers.0/self_attn/q_proj/MatMul", 2.0, 100, 50, kind="gemm"),
        operator("", 0.5),  # the engine's own: it counts to the layer before it
        operator("/model/layers.10/mlp/up_proj/MatMul", 3.0, 200, 0, kind="gemm"),
        operator("/lm_head/MatMul", 4.0, 300, 0, kind="gemm"),
    ]
    parts = by_part(operators)
    assert [(part.part, part.ms, part.linear_ms) for part in parts] == [
        ("0", 2.5, 2.0),
        ("10", 3.0, 3.0),
        ("outside", 5.0, 4.0),
    ]
    assert [part.sparsity for part in parts] == [0.5, 0.0, 0.0]
    assert [part.sparse_kernels for part in parts] == [1, 0, 0]
    assert [(kind.kind, kind.ms, kind.count) for kind in by_kind(operators)] == [
        ("gemm", 9.0, 3),
        ("gather", 1.0, 1),
        ("mul", 0.5, 1),
    ]


def test_runs_keep_the_least_time_of_each_operator() -> None:
    runs = [[operator("a", 1.0), operator("b", 9.0)], [operator("a", 2.0), operator("b", 3.0)]]
    assert [one["ms"] for one in least_of_runs(runs)] == [1.0, 3.0]
