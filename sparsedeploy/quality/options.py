"""What is measured of a model's quality: the options of ``eval``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sparsedeploy.errors import UserError
from sparsedeploy.options import Options, option, seed_option


@dataclass(frozen=True)
class TextOptions(Options):
    """What perplexity is measured on.

    Attributes:
        data: texts, each ``TEXT`` or ``NAME=TEXT``.
        max_windows: of each text; None takes all.
    """

    data: tuple[str, ...] = option(
        (),
        "Text for perplexity: file, folder, .jsonl, stdlib, c4 or datasets:NAME[:CONFIG]. Repeat for several, each as "
        "NAME=TEXT.",
        short="-d",
        repeated=True,
        reads=True,
    )
    split: str = option("test", "Split of a named set: train, validation or test.", only_with="data")
    field: str = option("text", "Text field of JSONL rows and data sets.", flag="--data-field", only_with="data")
    max_windows: int | None = option(None, "Use only the first N windows of each text.", at_least=1, only_with="data")


@dataclass(frozen=True)
class TaskOptions(Options):
    """What lm-evaluation-harness measures.

    Attributes:
        names: tasks, tags or groups of the harness, of ``folders`` or of
            :data:`~sparsedeploy.quality.tasks.GROUPS`.
        folders: folders of task files (YAML) of one's own; ``data_files`` in them are relative to their file.
        limit: None takes all documents.
        fewshot: None leaves it to the task, which mostly means none.
        seed: also of everything random in the harness.
    """

    names: tuple[str, ...] = option(
        (),
        "Tasks of lm-evaluation-harness, separated by commas; papers stands for the seven zero-shot tasks of the "
        "pruning papers, python_lines needs no download.",
        flag="--tasks",
    )
    folders: tuple[Path, ...] = option(
        (), "Folder with your own task files.", flag="--task-path", repeated=True, only_with="names"
    )
    limit: int | None = option(None, "Use only the first N documents of each task.", at_least=1, only_with="names")
    fewshot: int | None = option(
        None, "Examples before each question.", unset="the task's own, often 0", at_least=0, only_with="names"
    )
    seed: int = seed_option("Seed of the choice of examples.", only_with="names")

    def __post_init__(self) -> None:
        super().__post_init__()
        for folder in self.folders:
            if not folder.is_dir():
                raise UserError(f"no folder of tasks at {folder}", "Give --task-path a folder with .yaml task files.")


@dataclass(frozen=True)
class EvalOptions(Options):
    """Everything that is measured, and in what pieces.

    Attributes:
        context: window length in tokens, and the longest input of a task. It changes the figures: never compare those
            of different contexts.
        batch_size: no effect on results.
    """

    text: TextOptions = field(default_factory=TextOptions)
    tasks: TaskOptions = field(default_factory=TaskOptions)
    context: int | None = option(None, "Window length in tokens.", unset="min(2048, positions)", at_least=2)
    batch_size: int = option(1, "Windows or requests per forward pass.", at_least=1)
