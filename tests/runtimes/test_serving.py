"""An exported folder served by the engine's own server: a real request, and what goes wrong in one line."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.errors import UserError
from sparsedeploy.runtimes.environments import Environment
from sparsedeploy.runtimes.installation import process_environment
from sparsedeploy.runtimes.options import EngineOptions, ServeOptions
from sparsedeploy.runtimes.serving import serve
from tests.runtimes.artifacts import describe, refresh, write_folder
from tests.runtimes.exported import Exported, export_small
from tests.runtimes.processes import has_ended, wait_until
from tests.small_models import byte_tokenizer

PROMPT = "def main("
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_small(tmp_path_factory.mktemp("served"), "llama", 0.5)


@pytest.fixture(scope="module")
def with_server(deepsparse_runtime: Environment) -> Environment:
    done = subprocess.run(
        [str(deepsparse_runtime.python), "-c", "import fastapi, uvicorn, datasets, transformers"],
        env=process_environment(deepsparse_runtime.runtime),
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip("needs: sparsedeploy runtime install deepsparse --with server (350 MB)")
    return deepsparse_runtime


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.usefixtures("with_server")
def test_a_request_gets_the_text_of_transformers(llama: Exported) -> None:
    ids = byte_tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": 257, "pad_token_id": 258}
    expected = llama.model.generate(ids, **settings)[0, ids.shape[1] :]
    with serve(llama.folder, ServeOptions(port=0, length=64), EngineOptions(cores=1)) as served:
        body = json.dumps({"sequences": PROMPT, "max_new_tokens": NEW_TOKENS, "do_sample": False}).encode()
        request = urllib.request.Request(served.url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as reply:
            answer = json.load(reply)
        assert served.process.poll() is None
    # The engine's pipeline gives one token more than it is asked for.
    text = answer["generations"][0]["text"]
    assert text.startswith(byte_tokenizer().decode(expected, skip_special_tokens=True))
    assert len(text) <= NEW_TOKENS + 1
    assert served.process.poll() is not None
    load_artifact(llama.folder, verify=True)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.usefixtures("with_server")
def test_a_server_that_dies_shows_its_last_words(llama: Exported, tmp_path: Path) -> None:
    folder = shutil.copytree(llama.folder, tmp_path / "broken")
    # The server alone reads it.
    (folder / "tokenizer.json").write_text("no tokenizer")
    refresh(folder)
    with (
        pytest.raises(
            UserError, match=r"the deepsparse server ended with exit code 1 during its start: .*Error"
        ) as caught,
        serve(folder, ServeOptions(port=0, length=64), EngineOptions(cores=1)),
    ):
        pass
    log = Path(str(caught.value).rsplit("log: ", 1)[1].rstrip("."))
    assert "Error" in log.read_text()
    assert "\n" not in str(caught.value)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.usefixtures("with_server")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_to_the_command_ends_the_engines_server_too(
    llama: Exported, number: signal.Signals, code: int
) -> None:
    command = [sys.executable, "-m", "sparsedeploy", "serve", str(llama.folder), "--port", "0"]
    options = ["--length", "64", "--cores", "1"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as cli:
        assert cli.stdout is not None
        listening = re.match(r"deepsparse is listening at http://127\.0\.0\.1:(\d+)/", cli.stdout.readline())
        assert listening is not None
        started = psutil.Process(cli.pid).children(recursive=True)
        assert any("deepsparse/server.py" in " ".join(process.cmdline()) for process in started)
        cli.send_signal(number)
    assert cli.returncode == code
    wait_until(lambda: all(has_ended(process) for process in started))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", int(listening[1])))


@pytest.mark.engine
@pytest.mark.usefixtures("deepsparse_runtime")
def test_port_in_use(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "artifact", describe())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port} .*Use another --port"),
            serve(folder, ServeOptions(port=port, length=32)),
        ):
            pass


@pytest.mark.usefixtures("deepsparse_runtime")
def test_an_engine_that_takes_one_request_at_a_time(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "artifact", describe())
    with (
        pytest.raises(UserError, match=r"deepsparse computes one request at a time.*Leave --parallel out"),
        serve(folder, ServeOptions(port=0, length=32, parallel=2)),
    ):
        pass


def test_what_cannot_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "artifact", describe())
    with (
        pytest.raises(UserError, match="65 tokens does not fit the model's 64 positions"),
        serve(folder, ServeOptions(port=0, length=65)),
    ):
        pass
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(tmp_path / "home"))
    with (
        pytest.raises(UserError, match="runtime install deepsparse"),
        serve(folder, ServeOptions(port=0, length=32)),
    ):
        pass
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="not an exported artifact"), serve(tmp_path / "plain", ServeOptions(port=0)):
        pass
