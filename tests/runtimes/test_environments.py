"""Managed environments: found states, refusals, and real installations of a small local wheel."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.runtimes import environments, installation, pythons, specification
from sparsedeploy.runtimes.specification import load_runtime
from tests.runtimes.toy import write_runtime, write_wheel


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "a home" / "cache"
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(folder))
    return folder


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ``export`` folder of our own, instead of the shipped one."""
    folder = tmp_path / "export"
    folder.mkdir()
    monkeypatch.setattr(specification, "shipped", lambda name: folder)
    return folder


def test_the_current_folder_is_not_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    done = installation.run_code(load_runtime("torch"), Path(sys.executable), "import json; print(json.dumps([1]))")
    assert (done.returncode, done.stdout) == (0, "[1]\n")


def test_not_installed_names_the_command() -> None:
    with pytest.raises(
        UserError, match=r"runtime deepsparse is not installed. Run: sparsedeploy runtime install deepsparse"
    ):
        environments.require("deepsparse")
    with pytest.raises(UserError, match=r"runtime deepsparse is not installed"):
        environments.remove("deepsparse")
    (found,) = [status for status in environments.list_runtimes() if status.name == "deepsparse"]
    assert (found.state, found.bytes, found.versions) == ("not installed", 0, {})


@pytest.mark.parametrize("marker", [None, "", "[]", "{}"])
def test_interrupted_installation_is_not_used(home: Path, marker: str | None) -> None:
    folder = home / "runtimes" / "deepsparse"
    (folder / "env" / "bin").mkdir(parents=True)
    (folder / "env" / "bin" / "python").symlink_to(sys.executable)
    if marker is not None:
        (folder / "complete.json").write_text(marker)
    assert environments.status("deepsparse").state == "incomplete"
    with pytest.raises(UserError, match=r"not completely installed.*runtime install deepsparse"):
        environments.require("deepsparse")


def test_marker_without_its_environment_is_incomplete(home: Path) -> None:
    folder = home / "runtimes" / "deepsparse"
    folder.mkdir(parents=True)
    (folder / "complete.json").write_text(
        json.dumps({"requirements_sha256": load_runtime("deepsparse").requirements_sha256})
    )
    assert environments.status("deepsparse").state == "incomplete"


def test_changed_pins_are_noticed(home: Path) -> None:
    folder = home / "runtimes" / "deepsparse"
    (folder / "env" / "bin").mkdir(parents=True)
    (folder / "env" / "bin" / "python").symlink_to(sys.executable)
    (folder / "complete.json").write_text(json.dumps({"requirements_sha256": "0" * 64}))
    assert environments.status("deepsparse").state == "outdated"
    with pytest.raises(UserError, match=r"other pins or sources.*runtime install deepsparse"):
        environments.require("deepsparse")


def test_python_too_new_or_too_old_names_the_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deepsparse = load_runtime("deepsparse")
    old = dataclasses.replace(deepsparse, python=((3, 0), (3, 1)))
    new = dataclasses.replace(deepsparse, python=((3, 98), (3, 99)))
    monkeypatch.setenv("PATH", str(tmp_path))
    running = f"{sys.version_info[0]}.{sys.version_info[1]}"
    with pytest.raises(
        UserError,
        match=rf"Python {running} is too new for DeepSparse \(needs 3.0 to 3.1\).*--python /path/to/python3.1",
    ):
        pythons.find_python(old)
    with pytest.raises(UserError, match=rf"Python {running} is too old for DeepSparse \(needs 3.98 to 3.99\)"):
        pythons.find_python(new)
    with pytest.raises(UserError, match=rf"Python {running} at .* is too new for DeepSparse"):
        pythons.find_python(old, sys.executable)
    with pytest.raises(UserError, match=r"is not a working Python interpreter"):
        pythons.find_python(deepsparse, str(tmp_path / "nothing"))


def test_running_python_is_taken_when_it_fits_else_one_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = (sys.version_info[0], sys.version_info[1])
    fits = dataclasses.replace(load_runtime("deepsparse"), python=(version, version))
    assert pythons.find_python(fits) == Path(sys.executable)
    # The link has the name of a supported version and runs as one.
    link = tmp_path / f"python{version[0]}.{version[1]}"
    link.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(pythons.sys, "executable", str(tmp_path / "broken"))
    assert pythons.find_python(fits) == link


def test_other_pythons_settings_do_not_reach_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("PIP_TARGET", "/elsewhere")
    monkeypatch.setenv("PIP_RETRIES", "7")
    variables = installation.process_environment(load_runtime("deepsparse"))
    assert "PYTHONPATH" not in variables
    assert "PIP_TARGET" not in variables
    assert variables["PIP_RETRIES"] == "7"
    assert variables["NM_DISABLE_ANALYTICS"] == "1"


@pytest.mark.slow
def test_install_use_change_and_remove(export: Path, home: Path, tmp_path: Path) -> None:
    write_runtime(export, str(write_wheel(tmp_path, "1.0", "GREETING = 'hello'")))
    # What an interrupted installation leaves behind.
    (home / "runtimes" / "toy" / "env" / "bin").mkdir(parents=True)
    status = environments.install("toy")
    assert (status.state, status.versions) == ("installed", {"toy-engine": "1.0"})
    assert status.bytes > 0
    assert not list(home.rglob("toy_engine-1.0-py3*.whl"))

    marker = home / "runtimes" / "toy" / "complete.json"
    written = marker.stat().st_mtime_ns
    environments.install("toy")
    assert marker.stat().st_mtime_ns == written

    environment = environments.require("toy")
    assert environment.python.is_relative_to(home)
    with environment.worker() as worker:
        assert worker.ready == {"greeting": "hello"}
    assert environments.check("toy").python.startswith(f"{sys.version_info[0]}.{sys.version_info[1]}")
    # The same runtime in an environment that the user already has.
    assert environments.check("toy", str(environment.python)).interpreter == str(environment.python)
    with pytest.raises(UserError, match=r"toy ended with exit code 1 during 'start': .*No module named 'toy_engine'"):
        environments.check("toy", sys.executable)

    write_runtime(export, str(write_wheel(tmp_path, "2.0", "GREETING = 'good day'")))
    assert environments.status("toy").state == "outdated"
    assert environments.install("toy").versions == {"toy-engine": "2.0"}

    assert environments.remove("toy") > 0
    assert environments.status("toy").state == "not installed"


@pytest.mark.slow
def test_failed_installation_shows_pips_words_and_the_log(export: Path, home: Path) -> None:
    write_runtime(export, "no-such-engine==1.0")
    with pytest.raises(UserError, match=r"the installation failed: .*no-such-engine.*The whole log: ") as caught:
        environments.install("toy")
    log = Path(str(caught.value).rsplit("log: ", 1)[1].rstrip("."))
    assert "No matching distribution found for no-such-engine==1.0" in log.read_text()
    assert environments.status("toy").state == "incomplete"


@pytest.mark.slow
def test_engine_that_does_not_import_is_not_marked_complete(export: Path, tmp_path: Path) -> None:
    write_runtime(export, str(write_wheel(tmp_path, "1.0", "raise OSError('no such instruction set')")))
    with pytest.raises(UserError, match=r"Toy was installed but does not start: .*no such instruction set"):
        environments.install("toy")
    assert environments.status("toy").state == "incomplete"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(locked / "cache"))
    with pytest.raises(UserError, match=r"Set SPARSEDEPLOY_HOME"):
        environments.install("deepsparse")
