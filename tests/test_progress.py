"""What a file says is printed, never obeyed."""

import io

import pytest
from rich.table import Table

from sparsedeploy import progress
from sparsedeploy.progress import SafeConsole, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 模型 😀\t\n", "plain é 模型 😀\t\n"),
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("a\rb\x08c\x00", "a\\rb\\x08c\\x00"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("\ud800", "\\ud800"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_consoles_escape_lines_and_cells() -> None:
    out = io.StringIO()
    table = Table("head\x1b[2J")
    table.add_row("cell\x1b]0;x\x07")
    console = SafeConsole(file=out, width=80)
    console.print("line\x1b[5m", markup=False)
    console.print(table)
    assert "\x1b" not in out.getvalue()
    assert all(part in out.getvalue() for part in ("line\\x1b[5m", "head\\x1b[2J", "cell\\x1b]0;x\\x07"))


def test_notes_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    progress.show()
    progress.note("model \x1b[2J")
    progress.show(False)
    assert capsys.readouterr().err == "model \\x1b[2J\n"
