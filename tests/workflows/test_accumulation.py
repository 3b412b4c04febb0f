"""``--accumulate`` counts wherever statistics are summed: recoveries, searches and models in memory among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparsedeploy
from sparsedeploy.calibration import driver
from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.calibration.statistics import InputStatistics, Kind
from sparsedeploy.recovery.options import DataOptions
from sparsedeploy.workflows.options import PruneOptions, RecoverOptions
from sparsedeploy.workflows.prune import prune
from sparsedeploy.workflows.recover import prune_and_recover, recover_checkpoint
from tests.small_models import byte_tokenizer, save_model

TRAINING = {"learning_rate": 1e-3, "accumulation": 1}
RECOVERIES: dict[str, dict[str, Any]] = {
    "losa": {"steps": 1, "first_rank": 2},
    "sparselo": {"rank": 2},
    "sparse-lora": {"rank": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accumulation")
    save_model(folder / "dense", num_hidden_layers=3)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return folder


def pruning(place: Path, **changes: Any) -> PruneOptions:
    calibration = CalibrationOptions(str(place / "text.txt"), sequences=2, length=24, accumulate="float64")
    return PruneOptions(sparsity=0.5, method="wanda", calibration=calibration, **changes)


def recovery(place: Path, method: str) -> RecoverOptions:
    data = DataOptions(str(place / "text.txt"), max_length=24, samples=8)
    return RecoverOptions(method, RECOVERIES[method], data, TRAINING)


def recovered(method: str, allocation: str) -> Callable[[Path, Path], Any]:
    return lambda place, out: prune_and_recover(
        str(place / "dense"), out, pruning(place, allocation=allocation), recovery(place, method)
    )


def recovered_again(place: Path, out: Path) -> None:
    prune(str(place / "dense"), out.with_name("first"), pruning(place))
    recover_checkpoint(out.with_name("first"), out, recovery(place, "losa"))


def searched(allocation: str, **options: Any) -> Callable[[Path, Path], Any]:
    def run(place: Path, out: Path) -> None:
        found = {"text": str(place / "text.txt"), "windows": 2, **options}
        if allocation == "auto":
            found["database"] = str(out.with_name("levels"))
        prune(str(place / "dense"), out, pruning(place, allocation=allocation, allocation_options=found))

    return run


def in_memory(place: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "dense")
    sparsedeploy.prune(model, pruning(place), byte_tokenizer())


@pytest.mark.parametrize(
    "run",
    [
        *(pytest.param(recovered(method, "dlp"), id=method) for method in RECOVERIES),
        pytest.param(recovered_again, id="recover"),
        pytest.param(searched("auto", confirm=1), id="auto"),
        pytest.param(searched("atp", search=True, trials=1), id="atp"),
        pytest.param(in_memory, id="memory"),
    ],
)
def test_every_sum_is_in_the_type_that_was_asked_for(
    run: Callable[[Path, Path], Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    class Recorded(InputStatistics):
        def __init__(
            self, columns: int, kind: Kind, device: torch.device, accumulate: torch.dtype = torch.float32
        ) -> None:
            super().__init__(columns, kind, device, accumulate)
            seen.append(accumulate)

    monkeypatch.setattr(driver, "InputStatistics", Recorded)
    run(place, tmp_path / "out")
    assert set(seen) == {torch.float64}
