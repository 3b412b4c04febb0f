"""``sparsedeploy eval``."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsedeploy.cli.common import DeviceOption, JsonOption, TrustOption, console, print_json


def eval_command(
    model: Annotated[str, typer.Argument(help="Model folder (dense or pruned) or hub id.")],
    data: Annotated[
        str, typer.Option("--data", "-d", help="Text: file, folder, .jsonl, stdlib, c4 or datasets:NAME[:CONFIG].")
    ],
    split: Annotated[str, typer.Option("--split", help="Split of a named set: train, validation or test.")] = "test",
    data_field: Annotated[str, typer.Option("--data-field", help="Text field of JSONL rows and data sets.")] = "text",
    context: Annotated[
        int | None, typer.Option("--context", "-c", help="Window length in tokens [default: min(2048, positions)].")
    ] = None,
    max_windows: Annotated[int | None, typer.Option("--max-windows", help="Only the first so many windows.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Windows per forward pass.")] = 1,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity on a text (lower is better; compare only figures of one text and one context)."""
    from sparsedeploy.evaluation.evaluate import evaluate

    result = evaluate(
        model,
        data,
        split=split,
        field=data_field,
        context=context,
        max_windows=max_windows,
        batch_size=batch_size,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json(result)
        return
    console.print(
        f"perplexity {result['perplexity']:.3f}  ({data}, {result['windows']} windows of {result['context']} tokens)"
    )
