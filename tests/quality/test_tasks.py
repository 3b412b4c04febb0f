"""Scores of the harness against a direct computation, tasks of one's own, several texts, and bad input. No network."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("lm_eval")

from sparsedeploy.errors import UserError
from sparsedeploy.models.loading import load_model
from sparsedeploy.models.tokenizer import load_tokenizer
from sparsedeploy.quality import tasks as adapter
from sparsedeploy.quality.evaluate import evaluate, named_texts
from sparsedeploy.quality.options import EvalOptions, TaskOptions
from sparsedeploy.quality.tasks import PAPER_TASKS, SAMPLE_TASKS, load_tasks
from tests.cli.conftest import Outcome, cli  # noqa: F401 - a fixture
from tests.small_models import save_model

Cli = Callable[..., Outcome]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""


def write_task(folder: Path, name: str, rows: list[dict[str, object]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tasks") / "m")


def direct_choice(folder: Path, question: str, choices: list[str]) -> int:
    """The choice with the largest log-likelihood, one forward pass each."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    scores = []
    for choice in choices:
        prompt, whole = (tokenizer(text)["input_ids"] for text in (question, question + choice))
        with torch.no_grad():
            log_probabilities = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        answer = range(len(prompt), len(whole))
        scores.append(sum(log_probabilities[at - 1, whole[at]].item() for at in answer))
    return max(range(len(choices)), key=scores.__getitem__)


def test_equals_a_direct_computation_at_any_batch_size(random_llama: Path, tmp_path: Path) -> None:
    rows = [
        {"question": f"question {n}:", "choices": [f" yes {n}", " no", " why not?"], "answer": n % 3} for n in range(9)
    ]
    folder = write_task(tmp_path / "own", "mine", rows)
    right = [direct_choice(random_llama, row["question"], row["choices"]) == row["answer"] for row in rows]
    accuracy = sum(right) / len(right)
    assert 0 < accuracy < 1
    for batch_size in (1, 4):
        result = evaluate(random_llama, EvalOptions(tasks=TaskOptions(("mine",), (folder,)), batch_size=batch_size))
        assert result["tasks"]["mine"]["acc"] == pytest.approx(accuracy)
        # The standard error of a proportion, from the sample.
        error = math.sqrt(accuracy * (1 - accuracy) / (len(rows) - 1))
        assert result["tasks"]["mine"]["acc_stderr"] == pytest.approx(error)
    assert result["harness"]["documents"] == {"mine": 9}
    assert result["harness"]["fewshot"] == {"mine": 0}
    assert result["harness"]["cut_prompts"] == 0
    assert "texts" not in result
    json.dumps(result, allow_nan=False)


def test_limit_examples_and_means_over_tasks(random_llama: Path, tmp_path: Path) -> None:
    rows = [{"question": f"q{n}:", "choices": [" a", " b"], "answer": 0} for n in range(6)]
    write_task(tmp_path / "own", "one", rows)
    folder = write_task(tmp_path / "own", "two", [{**row, "answer": 1} for row in rows])
    options = TaskOptions(("one", "two"), (folder,), limit=4, fewshot=2)
    result = evaluate(random_llama, EvalOptions(tasks=options))
    assert result["harness"]["documents"] == {"one": 4, "two": 4}
    assert result["harness"]["fewshot"] == {"one": 2, "two": 2}
    accuracies = [result["tasks"][name]["acc"] for name in ("one", "two")]
    assert result["task_means"] == {"acc": pytest.approx(sum(accuracies) / 2)}
    again = evaluate(random_llama, EvalOptions(tasks=options))
    assert again["tasks"] == result["tasks"]


def test_long_prompts_are_cut_and_counted_and_long_answers_refused(random_llama: Path, tmp_path: Path) -> None:
    rows = [{"question": "long " * 40, "choices": [" a", " b"], "answer": 0}] * 2
    folder = write_task(tmp_path / "own", "long", rows)
    result = evaluate(random_llama, EvalOptions(tasks=TaskOptions(("long",), (folder,))))
    assert result["harness"]["cut_prompts"] == 4
    write_task(folder, "longer", [{"question": "q", "choices": [" a" * 100, " b"], "answer": 0}])
    with pytest.raises(UserError, match="answer of 200 tokens is longer than the context of 128"):
        evaluate(random_llama, EvalOptions(tasks=TaskOptions(("longer",), (folder,))))


def test_a_diverged_model_has_no_score(random_llama: Path, tmp_path: Path) -> None:
    broken = save_model(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"][:] = 1e30
    tensors["model.norm.weight"][:] = 1e30
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="a score is not finite: the model has diverged"):
        evaluate(broken, EvalOptions(tasks=TaskOptions(("python_lines",), limit=2)))


def test_the_shipped_task_has_one_right_answer_each_evenly_placed() -> None:
    rows = [json.loads(line) for line in (SAMPLE_TASKS / "python_lines.jsonl").read_text().splitlines()]
    places = [row["answer"] for row in rows]
    assert {places.count(place) for place in range(4)} == {len(rows) // 4}
    assert all(len(set(row["choices"])) == 4 for row in rows)


def test_tasks_and_several_texts_in_one_file(cli: Cli, random_llama: Path, tmp_path: Path) -> None:  # noqa: F811
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"some words of {name}. " * 40)
    output = tmp_path / "quality.json"
    texts = ("-d", f"first={tmp_path / 'a.txt'}", "-d", tmp_path / "b.txt")
    outcome = cli(
        "eval", random_llama, *texts, "--tasks", "python_lines", "--limit", 4, "--context", 64, "-o", output, "--quiet"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    assert "python_lines" in outcome.out
    result = json.loads(output.read_text())
    assert list(result["texts"]) == ["first", str(tmp_path / "b.txt")]
    for text in result["texts"].values():
        assert 150 < text["perplexity"] < 400
    assert result["perplexity"] == result["texts"]["first"]["perplexity"]
    assert set(result["tasks"]["python_lines"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert result["harness"]["lm_eval"].startswith("0.4.")
    assert result["command"].startswith("sparsedeploy eval ")


def test_names_of_texts(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.txt"
    odd.write_text("x")
    assert named_texts(["c4", "wiki=w.txt", str(odd)]) == {"c4": "c4", "wiki": "w.txt", str(odd): str(odd)}
    with pytest.raises(UserError, match="text 'wiki' is given twice"):
        named_texts(["wiki=a", "wiki=b"])


def test_bad_input(random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_task(tmp_path / "own", "mine", [{"question": "q", "choices": [" a", " b"], "answer": 0}])
    for bad, message in (
        ({"limit": 0}, "limit is 0"),
        ({"fewshot": -1}, "fewshot is -1"),
        ({"folders": (tmp_path / "nowhere",)}, "no folder of tasks"),
    ):
        with pytest.raises(UserError, match=message):
            TaskOptions(**{"names": ("mine",), **bad})
    with pytest.raises(UserError, match="nothing to measure"):
        evaluate(random_llama, EvalOptions())
    (folder / "mine.jsonl").unlink()
    with pytest.raises(UserError, match=r"task 'mine' names mine\.jsonl, which is not in"):
        load_tasks(TaskOptions(("mine",), (folder,)))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(UserError, match=r"pip install 'sparsedeploy\[eval\]'"):
        load_tasks(TaskOptions(("mine",), (folder,)))


def test_data_that_is_neither_here_nor_reachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "far.yaml").write_text(TASK.format(name="far").replace("path: json", "path: no-such/data-set"))
    (tmp_path / "far.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"data of task 'far' \(no-such/data-set\) could not be loaded") as refused:
        load_tasks(TaskOptions(("far",), (tmp_path,)))
    assert "HF_HOME" in str(refused.value)


# Rows of the form that the papers' data sets have; the data sets themselves need a network.
_CHOICES = {"text": ["wood", "iron", "milk", "sand"], "label": ["A", "B", "C", "D"]}
ROWS: dict[str, dict[str, object]] = {
    "boolq": {"passage": "Iron is a metal.", "question": "is iron a metal", "label": 1, "idx": 0},
    "rte": {"sentence1": "Iron is a metal.", "sentence2": "Iron is wood.", "label": 1, "idx": 0},
    "hellaswag": {
        "ind": 0,
        "activity_label": "Baking",
        "ctx_a": "A man mixes flour.",
        "ctx_b": "he",
        "ctx": "A man mixes flour. he",
        "endings": ["bakes it.", "flies.", "is a lake.", "rains."],
        "label": "0",
    },
    "winogrande": {
        "sentence": "The cup broke the plate because _ was hard.",
        "option1": "the cup",
        "option2": "the plate",
        "answer": "1",
    },
    "arc_easy": {"id": "a", "question": "Which is a metal?", "choices": _CHOICES, "answerKey": "B"},
    "arc_challenge": {"id": "b", "question": "Which is drunk?", "choices": _CHOICES, "answerKey": "C"},
    "openbookqa": {"id": "c", "question_stem": "Which is a metal?", "choices": _CHOICES, "answerKey": "B"},
}
FOLDERS = ("super_glue/boolq", "glue/rte", "hellaswag", "winogrande", "arc", "openbookqa")


def test_the_papers_tasks_run_on_rows_of_their_form(random_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import lm_eval.tasks

    of_source = {
        ("aps/super_glue", "boolq"): "boolq",
        ("nyu-mll/glue", "rte"): "rte",
        ("Rowan/hellaswag", None): "hellaswag",
        ("allenai/winogrande", "winogrande_xl"): "winogrande",
        ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
        ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
        ("allenai/openbookqa", "main"): "openbookqa",
    }

    def local(path: str, name: str | None = None, **_: object) -> datasets.DatasetDict:
        rows = datasets.Dataset.from_list([ROWS[of_source[path, name]]] * 3)
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    monkeypatch.setattr(datasets, "load_dataset", local)
    # The tasks' own folders are enough: the whole index takes ten seconds to read.
    folders = tuple(Path(lm_eval.tasks.__file__).parent / folder for folder in FOLDERS)
    result = evaluate(random_llama, EvalOptions(tasks=TaskOptions(("papers",), folders, limit=2)))
    assert tuple(result["tasks"]) == PAPER_TASKS
    for metrics in result["tasks"].values():
        assert 0 <= metrics["acc"] <= 1
    assert list(result["task_means"]) == ["acc"]
    assert set(result["harness"]["documents"].values()) == {2}
    assert set(result["harness"]["fewshot"].values()) == {0}


def test_unknown_tasks_get_the_closest() -> None:
    assert "Closest: arc_easy" in str(adapter._unknown("arc_esy", ["arc_easy", "boolq"]))
    assert "Closest: papers" in str(adapter._unknown("paper", ["arc_easy", "boolq"]))
    assert "Known, among others: papers, boolq" in str(adapter._unknown("zzz", ["arc_easy"]))
