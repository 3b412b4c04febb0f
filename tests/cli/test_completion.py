"""Shell completion as a shell asks for it, and the examples that each command's help starts with."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from sparsedeploy.cli.examples import EXAMPLES
from sparsedeploy.cli.main import app
from sparsedeploy.registry import ALLOCATORS, PRUNERS, RECOVERIES
from sparsedeploy.runtimes.specification import runtime_names
from sparsedeploy.workflows.options import recipe_names

_PROGRAM = (
    "import sys\nsys.argv = ['sparsedeploy']\nfrom sparsedeploy.__main__ import main\n"
    "try:\n    main()\nfinally:\n    heavy = {'torch', 'transformers', 'pandas', 'scipy'} & set(sys.modules)\n"
    "    sys.stderr.write('heavy: ' + ','.join(sorted(heavy)) + '\\n')\n"
)


def offered(shell: str, line: str) -> list[str]:
    """What the program answers when a shell asks for the last word of a line."""
    words = line.split(" ")
    environment = {
        **os.environ,
        "_SPARSEDEPLOY_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_TYPER_COMPLETE_WORD_TO_COMPLETE": words[-1],
    }
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert "heavy: \n" in done.stderr, done.stderr
    if shell == "zsh":
        names = re.findall(r'^(?:.*\(\()?"([^"]*)"', done.stdout, re.MULTILINE)
    else:
        names = [each.partition("\t")[0] for each in done.stdout.splitlines()]
    return sorted(name for name in names if name)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sparsedeploy prune MODEL --method ", PRUNERS.names()),
        ("sparsedeploy prune MODEL --allocation ", ALLOCATORS.names()),
        ("sparsedeploy prune MODEL --recipe losa-7", ["losa-70"]),
        ("sparsedeploy prune MODEL --recipe ", recipe_names()),
        ("sparsedeploy recover MODEL --method ", RECOVERIES.names()),
        ("sparsedeploy runtime install ", runtime_names()),
        ("sparsedeploy bench a --runtime ", runtime_names()),
        ("sparsedeploy export a --target lla", ["llamacpp"]),
        ("sparsedeploy deploy MODEL --method wanda,spars", ["wanda,sparsegpt"]),
        ("sparsedeploy pus", ["push"]),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_names_are_offered_without_heavy_imports(shell: str, line: str, expected: list[str]) -> None:
    assert offered(shell, line) == sorted(expected)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_script_works_in_bash(tmp_path: Path) -> None:
    """The script that ``--show-completion`` prints, in a real bash, for a program of that name on PATH."""
    program = tmp_path / "sparsedeploy"
    start = "import sys\nsys.argv[0] = 'sparsedeploy'\nfrom sparsedeploy.__main__ import main\nmain()\n"
    program.write_text(f"#!{sys.executable}\n{start}")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = (
        'eval "$(_SPARSEDEPLOY_COMPLETE=source_bash sparsedeploy)"\n'
        "COMP_WORDS=(sparsedeploy prune MODEL --method spars); COMP_CWORD=4\n"
        'complete -p sparsedeploy | grep -o "_[a-z_]*completion" > /dev/null || exit 3\n'
        'function=$(complete -p sparsedeploy | sed "s/.*-F \\([^ ]*\\).*/\\1/"); $function sparsedeploy\n'
        'echo "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["sparsegpt"], done.stderr


def commands() -> dict[str, object]:
    """Every command by its path, as click has it."""
    root = typer.main.get_command(app)
    found: dict[str, object] = {}
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        found.update({f"{name} {each}": one for each, one in inner.items()} if inner else {name: command})
    return found


def test_every_command_has_two_examples() -> None:
    assert commands().keys() == EXAMPLES.keys()
    assert {len(lines) for lines in EXAMPLES.values()} == {2}


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_parse(line: str) -> None:
    """Every word of an example is a command, an option or a value that the command line takes."""
    program, *words = shlex.split(line)
    assert program == "sparsedeploy"
    command, context = typer.main.get_command(app), None
    while hasattr(command, "commands"):
        context = command.make_context(program, [*words], parent=context)
        program, *words = words
        command = command.commands[program]
    parsed = command.make_context(program, words, parent=context)
    assert parsed.params


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_starts_with_the_examples(name: str, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    from sparsedeploy.cli.main import main

    monkeypatch.setattr("sys.argv", ["sparsedeploy", *name.split(), "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None)
    assert capsys.readouterr().out.splitlines()[:2] == list(EXAMPLES[name])
