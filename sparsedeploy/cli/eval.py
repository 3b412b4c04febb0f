"""``sparsedeploy eval``."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sparsedeploy.cli.common import (
    DataFieldOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    TrustOption,
    console,
    parse_dtype,
    print_json,
)
from sparsedeploy.cli.flags import refuse_typed
from sparsedeploy.errors import UserError


def eval_command(
    context_: typer.Context,
    model: ModelArgument,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            help="Text for perplexity: file, folder, .jsonl, stdlib, c4 or datasets:NAME[:CONFIG]. "
            "Repeat for several, each as NAME=TEXT.",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            "-t",
            help="Tasks of lm-evaluation-harness, separated by commas; papers stands for the seven zero-shot tasks of "
            "the pruning papers, python_lines needs no download.",
        ),
    ] = None,
    task_path: Annotated[
        list[Path] | None, typer.Option("--task-path", help="Folder of task files of your own. Repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first so many documents of each task.")] = None,
    fewshot: Annotated[
        int | None, typer.Option("--fewshot", help="Examples before each question [default: the task's own, often 0].")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the choice of examples.")] = 0,
    split: Annotated[str, typer.Option("--split", help="Split of a named set: train, validation or test.")] = "test",
    data_field: DataFieldOption = "text",
    context: Annotated[
        int | None, typer.Option("--context", "-c", help="Window length in tokens [default: min(2048, positions)].")
    ] = None,
    max_windows: Annotated[int | None, typer.Option("--max-windows", help="Only the first so many windows.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Windows or requests per forward pass.")] = 1,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the result as JSON, which a report can show.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity on texts and accuracy on tasks of lm-evaluation-harness. Lower perplexity and higher accuracy
    are better; compare only figures of one text and one context."""
    from sparsedeploy.folders import write_json
    from sparsedeploy.quality.evaluate import evaluate
    from sparsedeploy.quality.tasks import TaskOptions

    if not data:
        refuse_typed(context_, ("split", "data_field", "max_windows"), "there is no --data")
    if not tasks and not task_path:
        refuse_typed(context_, ("limit", "fewshot", "seed"), "there are no --tasks")
    names = tuple(name.strip() for item in tasks or [] for name in item.split(",") if name.strip())
    asked = TaskOptions(names, tuple(task_path or []), limit, fewshot, seed) if tasks or task_path else None
    result = evaluate(
        model,
        _named_texts(data or []),
        tasks=asked,
        split=split,
        field=data_field,
        context=context,
        max_windows=max_windows,
        batch_size=batch_size,
        device=device,
        dtype=parse_dtype(dtype),
        trust_remote_code=trust_remote_code,
    )
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


def _named_texts(items: list[str]) -> dict[str, str]:
    """Name -> text of ``NAME=TEXT`` or plain ``TEXT`` items.

    Raises:
        UserError: a name is given twice.
    """
    texts: dict[str, str] = {}
    for item in items:
        named = re.fullmatch(r"([\w.+-]+)=(.+)", item)
        name, text = named.groups() if named and not Path(item).exists() else (item, item)
        if name in texts:
            raise UserError(f"text '{name}' is given twice", "Give each text a name of its own: --data NAME=TEXT.")
        texts[name] = text
    return texts


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
        console.print(f"{harness['cut_prompts']} prompts were longer than the context and lost their beginning")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
