"""A benchmark result and a report made by the real code from given samples: for pages, tables and comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sparsedeploy.machine import this_machine
from sparsedeploy.reporting.benchmark_page import repeat_command
from sparsedeploy.runtimes.specification import load_runtime
from sparsedeploy.speed.bandwidth import Bandwidth
from sparsedeploy.speed.benchmark import BenchmarkResult
from sparsedeploy.speed.candidates import Candidate
from sparsedeploy.speed.layer_profile import Profile, by_kind, by_part
from sparsedeploy.speed.options import BenchmarkOptions
from sparsedeploy.speed.rows import MEASURED, Outcome, Sample, Setting, judge_noise, make_row
from tests.runtimes.artifacts import describe

# Name -> zeros of 1000 weights, seconds of a prompt and of a token.
MODELS = {"dense": (0, 0.04, 0.004), "sparse-50": (500, 0.03, 0.003), "sparse-80": (800, 0.02, 0.002)}
LAYERS = 4


def bench_result(rounds: int = 6, batches: tuple[int, ...] = (1,)) -> dict[str, Any]:
    """Three candidates on DeepSparse at two prompt lengths, with a profile."""
    random = np.random.default_rng(0)
    runtime = load_runtime("deepsparse")
    candidates = [
        Candidate(name, runtime, Path(name), describe(zeros=zeros), "0" * 64, 5_000_000)
        for name, (zeros, _, _) in MODELS.items()
    ]
    bandwidth = Bandwidth(1, 1 << 20, [9.0, 10.0], [8.0, 7.5])
    rows, noise, samples = [], [], []
    for length in (8, 32):
        for batch in batches:
            setting = Setting(1, length, batch)
            for at in range(rounds):
                for turn, (name, (_, prompt, token)) in enumerate(MODELS.items()):
                    times = [1 + 0.002 * value for value in random.standard_normal(5).tolist()]
                    decode = [token * value for value in times[1:]]
                    samples.append(Sample(name, setting, at, turn, prompt * length / 8 * times[0], decode))
            outcome = Outcome(MEASURED, None, 1.5, 200_000_000)
            rows += [make_row(one, candidates[0], setting, samples, outcome, bandwidth) for one in candidates]
            judged = judge_noise(setting, samples)
            noise += [judged] if judged else []
    options = BenchmarkOptions(
        baseline="dense",
        cores=(1,),
        prompt_lengths=(8, 32),
        batches=batches,
        decode_tokens=4,
        rounds=rounds,
        warmup_rounds=1,
    )
    return BenchmarkResult(
        artifacts=["sparse-50", "sparse-80"],
        options=options,
        prompt_chunks={8: 8, 32: 32},
        started="2026-01-01T00:00:00+0000",
        machine=this_machine(),
        load_average=0.1,
        busy_cores=0.0,
        versions={"sparsedeploy": "0"},
        runtime={name: {"versions": {"deepsparse": "1.8.0"}} for name in MODELS},
        bandwidth={1: bandwidth},
        rows=rows,
        noise=noise,
        samples=samples,
        profiles=[_profile(name, zeros, token) for name, (zeros, _, token) in MODELS.items()],
        notes=["A note with <angle brackets> & an ampersand."],
    ).to_json()


def report(**changes: Any) -> dict[str, Any]:
    """A report of three models, two of them of one sparsity with different allocations, with tasks."""
    benchmark = bench_result()
    models = []
    for at, (name, (zeros, _, _)) in enumerate(MODELS.items()):
        rates = [zeros / 1000 + 0.05 * at * (layer - 1.5) / 1.5 for layer in range(LAYERS)]
        models.append(
            {
                "name": name,
                "sparsity": 0.0 if zeros == 0 else 0.65,
                "artifact_bytes": 5_000_000,
                "prunable_weights": 1000,
                "nonzero_weights": 1000 - zeros,
                "allocation": None if zeros == 0 else ("uniform", "owl")[at - 1],
                "layer_sparsity": None if zeros == 0 else rates,
                "modules": None if zeros == 0 else _modules(zeros),
                "samples": [
                    {"prompt": "Once upon <a> time", "tokens": [" there", " was", f" word{at}", " and", " an", " end"]},
                    {"prompt": "The last one", "tokens": [" is", " the", " same"]},
                ],
                "quality": {
                    **{"perplexity": 10.0 + 3 * at, "data": "text", "split": "test", "windows": 4, "context": 64},
                    "tasks": {
                        "boolq": {"acc": 0.7 - 0.1 * at, "acc_stderr": 0.01},
                        "arc_easy": {
                            "acc": 0.5,
                            "acc_stderr": 0.02,
                            "acc_norm": 0.6 - 0.1 * at,
                            "acc_norm_stderr": 0.03,
                        },
                    },
                },
                "commands": {"eval": f"sparsedeploy eval {name} --data text"}
                | ({} if zeros == 0 else {"prune": f"sparsedeploy prune dense -o {name}"}),
            }
        )
    return {
        "format": 2,
        "title": "A report",
        "sparsedeploy": "0",
        "command": "sparsedeploy demo",
        "summary": "2.00x decode over the dense model",
        "bound": 14.0,
        "compared": [_trial(0.5, "wanda", 12.0), {**_trial(0.5, "alps", None), "reason": "the model has diverged"}],
        "trials": [
            _trial(0.5, "wanda", 11.0),
            _trial(0.5, "sparsegpt", 10.5),
            _trial(0.7, "sparsegpt", 15.0),
            {**_trial(0.8, "sparsegpt", None), "reason": "the model has diverged"},
        ],
        "settings": {"method": "wanda", "sparsities": [0.5, 0.8]},
        "models": models,
        "commands": [repeat_command(benchmark)],
        "benchmark": benchmark,
        **changes,
    }


def _trial(rate: float, method: str, perplexity: float | None) -> dict[str, Any]:
    found = {"rate": rate, "method": method, "allocation": "uniform", "perplexity": perplexity}
    return {**found, "reason": None, "seconds": 12.0}


def _modules(zeros: int) -> list[dict[str, Any]]:
    """Two projections in each layer; the error grows with depth."""
    return [
        {"layer": layer, "projection": name, "weights": 1000, "zeros": zeros + 10 * layer, "loss": 0.5 * (1 + layer)}
        for layer in range(LAYERS)
        for name in ("q_proj", "up_proj")
    ]


def _profile(name: str, zeros: int, ms: float) -> Profile:
    operators = [
        {
            "node": f"/model/layers.{layer}/mlp/up_proj/MatMul",
            "kind": "gemm",
            "ms": ms * (1 + layer),
            "weights": 250,
            "zeros": zeros // 4,
            "sparse_kernel": zeros > 0,
        }
        for layer in range(LAYERS)
    ]
    parts = by_part(operators)
    total = sum(part.ms for part in parts)
    return Profile(name, "deepsparse", "decode", "1 token after 8 in the cache", None, total, parts, by_kind(operators))
