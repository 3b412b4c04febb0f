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
        ("one\u2028two\u2029", "one\\u2028two\\u2029"),
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


def test_a_log_gets_lines_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 40))  # every look at it is 40 s later
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    progress.show()
    with progress.bar("train", 10, "steps", done=2) as advance:
        advance(2, "loss 3.1")
        advance(2)
    progress.show(False)
    assert capsys.readouterr().err.splitlines() == [
        "train",
        "train: 4 of 10 steps, 2 min 0 s left (loss 3.1)",
        "train: 6 of 10 steps, 1 min 20 s left",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (7500, "2 h 5 min")])
def test_duration(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_what_others_print_is_dropped_and_notes_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm import tqdm

    progress.show(True)
    try:
        with progress.alone():
            print("bootstrapping")
            assert list(tqdm(range(3))) == [0, 1, 2]
            progress.note("ours")
            assert list(progress.track([1], "our bar")) == [1]
    finally:
        progress.show(False)
    print("after")
    assert tuple(capsys.readouterr()) == ("after\n", "ours\nour bar\n")
