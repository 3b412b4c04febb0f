"""``sparsedeploy eval``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from typing import Any

from rich.table import Table

from sparsedeploy.cli.common import JsonOption, ModelArgument, ResultOption, console, print_json
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.models.options import LoadOptions
from sparsedeploy.quality.options import EvalOptions, TaskOptions, TextOptions


@takes(
    Section("text", TextOptions),
    Section("tasks", TaskOptions),
    Section("eval", EvalOptions),
    Section("load", LoadOptions),
)
def eval_command(
    model: ModelArgument,
    given: Given,
    output: ResultOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity on texts and accuracy on tasks.

    The tasks are lm-evaluation-harness's. Lower perplexity and higher accuracy are better; compare only figures of one
    text and one context.
    """
    from sparsedeploy.folders import write_json
    from sparsedeploy.quality.evaluate import evaluate

    text, tasks = given.build("text", TextOptions), given.build("tasks", TaskOptions)
    options = replace(given.build("eval", EvalOptions), text=text, tasks=tasks)
    result = evaluate(model, options, given.build("load", LoadOptions))
    result["command"] = shlex.join(["sparsedeploy", *sys.argv[1:]])
    if output is not None:
        write_json(output, result)
    if as_json:
        print_json(result)
        return
    for name, text in result.get("texts", {}).items():
        console.print(
            f"perplexity {text['perplexity']:.3f}  ({name}, {text['windows']} windows of {text['context']} tokens)",
            markup=False,
            soft_wrap=True,
        )
    if "tasks" in result:
        _print_tasks(result)


def _print_tasks(result: dict[str, Any]) -> None:
    harness = result["harness"]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for header in ("task", "metric", "value", "error", "documents", "examples"):
        table.add_column(header, justify="left" if header in ("task", "metric") else "right", no_wrap=True)
    for name, metrics in result["tasks"].items():
        for metric in (key for key in metrics if "_stderr" not in key):
            error = metrics.get(metric.replace(",", "_stderr,") if "," in metric else f"{metric}_stderr")
            table.add_row(
                name,
                metric,
                _figure(metrics[metric]),
                "" if error is None else f"± {error:.4f}",
                str(harness["documents"][name]),
                str(harness["fewshot"][name]),
            )
    if len(result["tasks"]) > 1:
        for metric, mean in result["task_means"].items():
            table.add_row(f"mean of {len(result['tasks'])}", metric, _figure(mean))
    console.print(table)
    if harness["cut_prompts"]:
        console.print(f"{harness['cut_prompts']} prompts were longer than the context and were truncated on the left")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
