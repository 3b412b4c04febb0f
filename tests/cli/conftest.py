"""Run the command line in this process, as a user would see it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsedeploy import progress
from sparsedeploy.cli.main import main
from tests.small_models import save_model

# Files with a hole of gigabytes are not read.
_LARGE = 1 << 30
SHORT = {"-d": "--data", "-n": "--samples"}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: path -> bytes, None for folders and what is not a regular file.

    Of a file of more than a gigabyte its size and times stand for its bytes.
    """
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*"))}


def _content(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    about = path.stat()
    if about.st_size > _LARGE:
        return f"{about.st_size} bytes, {about.st_mtime_ns} {about.st_ctime_ns}".encode()
    return path.read_bytes()


def defaults(more: Iterable[object], **values: object) -> list[object]:
    """Words of the options that a test does not give itself: an option is given once.

    Args:
        values: option -> value, named by its long flag.
    """
    given = {SHORT.get(str(word), str(word)) for word in more}
    flags = {f"--{name.replace('_', '-')}": value for name, value in values.items()}
    return [word for flag, value in flags.items() if flag not in given for word in (flag, value)]


@dataclass
class Outcome:
    """How a command ended.

    Attributes:
        place: the test's folder; ``before`` what it held when the command started.
    """

    code: int
    out: str
    err: str
    place: Path
    before: dict[str, bytes | None]

    @property
    def changed(self) -> list[str]:
        """What the command created, changed or removed in the test's folder."""
        after = contents(self.place)
        return [
            name
            for name in sorted({*self.before, *after})
            if (name in self.before, self.before.get(name)) != (name in after, after.get(name))
        ]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Outcome]:
    def run(*arguments: object) -> Outcome:
        before = contents(tmp_path)
        monkeypatch.setattr("sys.argv", ["sparsedeploy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        progress.show(False)
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err, tmp_path, before)

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "dense")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return path
