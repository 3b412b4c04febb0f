"""Which metric stands for a task in a report: the papers' own, and named."""

from sparsedeploy.quality.tasks import PAPER_TASKS
from sparsedeploy.reporting.report import html_report
from sparsedeploy.reporting.summary import accuracy, score
from tests.reporting.results import report

BOTH = {"acc_norm": 0.7, "acc_norm_stderr": 0.02, "acc": 0.5, "acc_stderr": 0.01}


def test_accuracy_comes_before_normalised_accuracy() -> None:
    assert score(BOTH) == ("acc", 0.5, 0.01)
    assert score({"acc_norm": 0.7}) == ("acc_norm", 0.7, None)
    assert accuracy(dict.fromkeys(PAPER_TASKS, BOTH)) == 0.5


def test_the_metric_is_named() -> None:
    shown = report()
    for model in shown["models"]:
        model["quality"]["tasks"] = {"hellaswag": BOTH, "own": {"exact_match": 0.25}}
    page = html_report(shown)
    assert "hellaswag (acc)" in page
    assert "own (exact_match)" in page
