"""Results of ``eval`` that a folder keeps: of its model, and of the base that it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json
from sparsedeploy.reading import Fields, read_object

EVALUATION = "evaluation.json"
_AGAIN = "Write the results again: sparsedeploy eval -o FILE."


def load_evaluations(folder: Path, model: str, base: str | None) -> list[dict[str, Any]]:
    """The results that a folder keeps, those of other models left out; ``of`` says which it is, model or base.

    Args:
        model, base: hashes of the folder's model and of its base.

    Raises:
        UserError: a file that is damaged.
    """
    path = folder / EVALUATION
    if not path.is_file():
        return []
    names = {model: "model", base: "base"}
    fields = Fields(read_object(path, fix=_AGAIN), str(path), _AGAIN)
    found = [_evaluation(each) for each in fields.each("results")]
    return [{**one, "of": names[one["model_sha256"]]} for one in found if one["model_sha256"] in names]


def add_evaluations(folder: Path, files: Iterable[Path], model: str, base: str | None) -> None:
    """Keep results of ``eval`` in a folder; a newer one replaces an older one of the same tokens.

    Raises:
        UserError: a file that is not a result of ``eval``, or one of another model.
    """
    kept = load_evaluations(folder, model, base)
    for path in files:
        one = _evaluation(Fields(read_object(path, fix=_AGAIN), str(path), _AGAIN))
        if one["model_sha256"] not in (model, base):
            raise UserError(
                f"{path} is of another model than {folder} and its base (the hash differs)", "Measure this folder."
            )
        kept = [old for old in kept if _tokens(old) != _tokens(one)]
        kept.append(one)
    write_json(folder / EVALUATION, {"results": [{k: v for k, v in one.items() if k != "of"} for one in kept]})


def shown_text(data: str) -> str:
    """A text's name for others: a path tells its last part only."""
    return Path(data).name if "/" in data or "\\" in data else data


def _evaluation(fields: Fields) -> dict[str, Any]:
    """What is kept of a result of ``eval``."""
    texts = fields.fields("texts")
    if not texts.values:
        raise UserError(
            f"{fields.where} has no text that was measured", "Measure one: sparsedeploy eval --data TEXT -o FILE."
        )
    kept = {}
    for name in texts.values:
        one = texts.fields(name)
        kept[shown_text(name)] = {
            "data": shown_text(one.text("data")),
            "split": one.text("split", None) or "all of it",
            "tokens_sha256": one.text("tokens_sha256"),
            "perplexity": _perplexity(one),
            "windows": one.integer("windows", minimum=1),
            "context": one.integer("context", minimum=2),
        }
    return {"model_sha256": fields.text("model_sha256"), "dtype": fields.text("dtype"), "texts": kept}


def _perplexity(fields: Fields) -> float:
    value = fields.number("perplexity")
    if value < 1:
        raise UserError(f"{fields.where}: 'perplexity' is {value:.6g}, and is at least 1", fields.fix)
    return value


def _tokens(evaluation: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    return evaluation["model_sha256"], tuple(text["tokens_sha256"] for text in evaluation["texts"].values())
