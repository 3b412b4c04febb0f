"""``push`` against a stand-in of the hub's API, and the model cards that go along."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import is_package_available

from sparsedeploy.checkpoint.card import BASE_CARD, CARD, is_ours
from sparsedeploy.workflows.options import PruneOptions
from sparsedeploy.workflows.prune import prune
from tests.cli.conftest import Outcome
from tests.cli.mutations import mutations
from tests.cli.test_bad_input import refused
from tests.hub import TOKEN, Hub, running_hub
from tests.small_models import save_model

Cli = Callable[..., Outcome]
BASE_README = """---
license: apache-2.0
language:
- en
tags: [mine]
---
# The base
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("push")
    dense = save_model(place / "dense")
    (dense / CARD).write_text(BASE_README)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "_name_or_path": "someone/base-model"}))
    prune(str(dense), place / "pruned", PruneOptions(0.5, "magnitude"))
    return place


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has LFS only
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def sent(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_arrives_whole(cli: Cli, folders: Path, hub: Hub) -> None:
    outcome = cli("push", folders / "pruned", "me/model-50", "--private", "--json")
    assert outcome.code == 0, outcome.err
    files = dict(hub.repos["me/model-50"])
    del files[".gitattributes"]
    assert files == sent(folders / "pruned")
    assert hub.private["me/model-50"] is True
    assert set(hub.objects.values()) == {files["model.safetensors"], files["sparsity.masks"]}
    values = json.loads(outcome.out)
    assert values["url"].endswith(hub.commits["me/model-50"][-1])
    assert values["files"] == len(files)
    # Once more: what is there is named, and replaced only when asked to; what the folder lacks goes.
    outcome = cli("push", folders / "pruned", "me/model-50")
    assert outcome.code == 2
    assert f"me/model-50 holds {len(files)} files already" not in outcome.err  # README.md does not count
    assert f"me/model-50 holds {len(files) - 1} files already" in outcome.err
    assert "Pass --overwrite" in outcome.err
    hub.repos["me/model-50"]["stale.safetensors"] = b"old"
    assert cli("push", folders / "pruned", "me/model-50", "--overwrite", "--message", "again").code == 0
    assert "stale.safetensors" not in hub.repos["me/model-50"]


def test_what_was_pushed_loads_by_its_id(folders: Path, tmp_path: Path) -> None:
    """The environment's HF_ENDPOINT, a fresh process: push, then transformers and sparsedeploy by hub id."""
    with running_hub() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
        environment.pop("HF_HUB_OFFLINE", None)
        program = (
            "import sys, torch\n"
            "from pathlib import Path\n"
            "from transformers import AutoModelForCausalLM\n"
            "from sparsedeploy.workflows.options import PushOptions\n"
            "from sparsedeploy.workflows.push import push\n"
            "from sparsedeploy.models.loading import resolve_model\n"
            "from sparsedeploy.checkpoint.inspection import inspect_checkpoint\n"
            "push(Path(sys.argv[1]), 'me/loaded', PushOptions())\n"
            "ours = AutoModelForCausalLM.from_pretrained(sys.argv[1]).state_dict()\n"
            "theirs = AutoModelForCausalLM.from_pretrained('me/loaded').state_dict()\n"
            "assert all(torch.equal(ours[name], theirs[name]) for name in ours)\n"
            "print(len(inspect_checkpoint(resolve_model('me/loaded')).problems), 'problems')\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(folders / "pruned")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "0 problems"


@pytest.mark.parametrize(
    ("model", "refused", "message"),
    [
        ("me/none", {}, "has no model of this name (404: Repository not found). Check the name; for a private model"),
        ("none", {}, "has no model of this name (404: "),
        ("me/none", {"/revision/": (401, "Invalid credentials")}, "has no public model of this name (401: "),
        ("me/gated", {"/revision/": (403, "Access is restricted")}, "(403: Access is restricted). Accept its terms"),
        ("me/busy", {"/revision/": (429, "slow down")}, "asks to wait (429: slow down). Run the same command again"),
        ("me/..none", {}, "'me/..none' is neither a folder nor a name on a hub. Give a Hugging Face model folder"),
    ],
)
def test_a_model_that_the_hub_does_not_give(
    cli: Cli, hub: Hub, tmp_path: Path, model: str, refused: dict[str, tuple[int, str]], message: str
) -> None:
    hub.refused.update(refused)
    outcome = cli("prune", model, "-o", tmp_path / "out", "-s", "0.5")
    assert outcome.code == 2
    assert message in outcome.err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("repo", "refused", "message"),
    [
        ("you/model", {}, "does not let this token write to you/model (403: You don't have the rights"),
        ("me/model", {"/repos/create": (401, "Invalid token")}, "does not accept the token (401: Invalid token)"),
        ("me/model", {"/preupload/": (429, "slow down")}, "asks to wait (429: slow down)"),
        ("me/model", {"/commit/": (409, "conflict")}, "was changed meanwhile (409: conflict). Run the same command"),
        ("me/model", {"/lfs-store/": (403, "quota")}, "(403: quota)"),
        ("me/model", {"/commit/": (500, "broken")}, "answers with an error (500: broken)"),
        ("a/b/c", {}, "'a/b/c' is not a repository's name. Write it as OWNER/NAME"),
        ("model", {}, "'model' names no owner. Write it as OWNER/NAME, such as me/model"),
    ],
)
def test_refusals(
    cli: Cli,
    folders: Path,
    hub: Hub,
    repo: str,
    refused: dict[str, tuple[int, str]],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # its own retries wait
    hub.refused.update(refused)
    outcome = cli("push", folders / "pruned", repo)
    assert outcome.code == 2, outcome.err
    *_, last = outcome.err.splitlines()
    assert last.startswith("error: ")
    assert outcome.err.count("error: ") == 1
    assert message in last
    # After the reason is gone, the same command goes on.
    hub.refused.clear()
    if repo == "me/model":
        assert cli("push", folders / "pruned", repo).code == 0


def test_no_token_and_no_network(
    cli: Cli, folders: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed)
    outcome = cli("push", folders / "pruned", "me/model")
    assert outcome.code == 2
    assert f"{closed} cannot be reached" in outcome.err
    outcome = cli("prune", "me/model", "-o", tmp_path / "out", "-s", "0.5")
    assert f"'me/model' is not a local folder, and {closed} cannot be reached (" in outcome.err
    assert outcome.err.endswith("Check the path; for a model on the hub, the network.\n")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert f"there is no token for {closed}" in cli("push", folders / "pruned", "me/model").err
    assert hub.asked == []


def test_a_hub_without_xet(cli: Cli, folders: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub of one's own may not have the newer way of sending files; where the client has it, the fix is named."""
    if not is_package_available("hf_xet"):
        pytest.skip("hf_xet is not installed")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    outcome = cli("push", folders / "pruned", "me/model")
    assert outcome.code == 2
    assert "takes no files by Xet. Set HF_HUB_DISABLE_XET=1" in outcome.err


def test_only_sound_folders_of_ours_are_sent(cli: Cli, folders: Path, hub: Hub, tmp_path: Path) -> None:
    assert "has neither sparsity.json nor artifact.json" in cli("push", folders / "dense", "me/model").err
    copy = shutil.copytree(folders / "pruned", tmp_path / "copy")
    (copy / ".secret").write_text("x")
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    assert "file model.safetensors was changed after it was written" in cli("push", copy, "me/model").err
    shutil.copyfile(folders / "pruned" / "model.safetensors", copy / "model.safetensors")
    (copy / "link").symlink_to("/etc/hostname")
    assert "link is a link out of its folder" in cli("push", copy, "me/model").err
    assert hub.asked == []
    (copy / "link").unlink()
    (copy / CARD).unlink()
    assert cli("push", copy, "me/model").code == 0
    assert ".secret" not in hub.repos["me/model"]
    assert is_ours(hub.repos["me/model"][CARD].decode())  # written where it was missing


def test_the_card_is_the_hubs_and_keeps_the_licence(cli: Cli, folders: Path, tmp_path: Path) -> None:
    pruned = shutil.copytree(folders / "pruned", tmp_path / "pruned")
    text = (pruned / CARD).read_text()
    card = ModelCard(text)
    assert (card.data.license, card.data.language, card.data.base_model) == ("apache-2.0", ["en"], "someone/base-model")
    assert card.data.library_name == "transformers"
    assert "mine" not in card.data.tags
    assert {"sparse", "sparsedeploy", "magnitude"} <= set(card.data.tags)
    assert "apache-2.0" in text
    assert str(folders) not in text  # paths stay private
    assert (pruned / BASE_CARD).read_text() == BASE_README
    # Figures, of the folder and of its base on the same tokens.
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("a quick brown dog. " * 60)
    for name, folder in (("pruned", pruned), ("dense", folders / "dense")):
        result = tmp_path / f"{name}.json"
        assert cli("eval", folder, "--data", held_out, "--context", 64, "-o", result).code == 0
        assert cli("card", pruned, "--eval", result).code == 0
    card = ModelCard((pruned / CARD).read_text())
    measured = json.loads((tmp_path / "pruned.json").read_text())["perplexity"]
    assert card.data.eval_results is not None
    assert [each.metric_value for each in card.data.eval_results] == [pytest.approx(measured, abs=1e-3)]
    assert "| base model | this model | change |" in card.content
    assert str(tmp_path) not in card.content + (pruned / "evaluation.json").read_text()
    assert cli("inspect", pruned).code == 0  # the card may change
    # A model made of it starts without those figures, and with the same licence and base.
    prune(str(pruned), tmp_path / "again", PruneOptions(0.6, "magnitude"))
    again = ModelCard((tmp_path / "again" / CARD).read_text())
    assert again.data.eval_results is None
    assert (again.data.license, again.data.base_model) == ("apache-2.0", "someone/base-model")
    assert not (tmp_path / "again" / "evaluation.json").exists()


def test_an_edited_card_is_kept(cli: Cli, folders: Path, tmp_path: Path) -> None:
    pruned = shutil.copytree(folders / "pruned", tmp_path / "pruned")
    edited = (pruned / CARD).read_text().replace("## Run it", "## My own words")
    (pruned / CARD).write_text(edited)
    outcome = cli("card", pruned)
    assert outcome.code == 2
    assert "was not written by sparsedeploy, or was edited. Pass --overwrite: it is then kept" in outcome.err
    assert (pruned / CARD).read_text() == edited
    assert cli("card", pruned, "--overwrite").code == 0
    assert (pruned / "README.base-2.md").read_text() == edited
    assert is_ours((pruned / CARD).read_text())


def test_bad_results(cli: Cli, folders: Path, tmp_path: Path, text: Path) -> None:
    pruned = shutil.copytree(folders / "pruned", tmp_path / "pruned")
    before = sent(pruned)
    other = save_model(tmp_path / "other", seed=5)
    assert cli("eval", other, "--data", text, "--context", 32, "-o", tmp_path / "other.json").code == 0
    (tmp_path / "nothing.json").write_text("{}")
    for name, message in (("other", "is of another model"), ("nothing", "lacks"), ("absent", "cannot read")):
        outcome = cli("card", pruned, "--eval", tmp_path / f"{name}.json")
        assert outcome.code == 2
        assert message in outcome.err, outcome.err
    assert sent(pruned) == before
    assert "has no sparsity.json" in cli("card", other).err


HOSTILE = [
    *(
        f"---\nlicense: {value}\n---\n"
        for value in ('"\\ud800"', '"\\e[2J"', '"a\\nb: c"', "<b>mit</b>", "2020-01-01", ".inf")
    ),
    *(
        f"---\nlicense: {value}\n---\n"
        for value in ("&a [*a]", "{a: b}", "9" * 6000, "[" * 3000, "x" * 300, "!!python/name:os")
    ),
    "---\nlicense: mit\nlicense: gpl-3.0\n---\n",
    "---\n\tlicense: mit\n---\n",
    "---\nlicense: mit\n",
]


@pytest.mark.parametrize(
    "text", [*HOSTILE, "", "---\n: [\n---\n", "---\n- a\n---\n", "no front", "---\nlicense: [1, 2]\n---\n"]
)
def test_hostile_front_matter(text: str, tmp_path: Path) -> None:
    """No licence is better than one that nobody wrote so; the base's own card is kept as it was."""
    dense = save_model(tmp_path / "dense")
    (dense / CARD).write_text(text)
    prune(str(dense), tmp_path / "out", PruneOptions(0.5, "magnitude"))
    made = (tmp_path / "out" / CARD).read_text()
    card = ModelCard(made)
    assert card.data.license is None
    assert "which its folder does not name" in made
    assert (tmp_path / "out" / BASE_CARD).read_text() == text


def test_several_licences_are_carried(tmp_path: Path) -> None:
    dense = save_model(tmp_path / "dense")
    (dense / CARD).write_text("---\nlicense: [mit, apache-2.0]\n---\n")
    prune(str(dense), tmp_path / "out", PruneOptions(0.5, "magnitude"))
    text = (tmp_path / "out" / CARD).read_text()
    assert ModelCard(text).data.license == ["mit", "apache-2.0"]
    assert "That of the base model: mit, apache-2.0." in text


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["new", "overwrite"])
def test_what_is_no_card_is_not_written_over(
    cli: Cli, folders: Path, tmp_path: Path, kind: str, more: tuple[str, ...]
) -> None:
    pruned = shutil.copytree(folders / "pruned", tmp_path / "pruned")
    (pruned / CARD).unlink()
    if kind == "folder":
        (pruned / CARD).mkdir()
    elif kind == "pipe":
        os.mkfifo(pruned / CARD)
    else:
        (pruned / CARD).symlink_to("gone")
    outcome = cli("card", pruned, *more)
    assert (outcome.code, outcome.changed) == (2, [])
    assert f"{pruned / CARD} is not a file. Remove it." in outcome.err


def test_edited_results(cli: Cli, folders: Path, tmp_path: Path, text: Path) -> None:
    """What is accepted has figures that can be; nothing of it becomes markup."""
    pruned = shutil.copytree(folders / "pruned", tmp_path / "pruned")
    assert cli("eval", pruned, "--data", text, "--context", 64, "-o", tmp_path / "r.json").code == 0
    sound = (tmp_path / "r.json").read_bytes()
    for content in mutations(sound, 60, 41, lambda place: place[0] not in ("texts", "model_sha256", "dtype")):
        (tmp_path / "r.json").write_bytes(content)
        outcome = cli("card", pruned, "--eval", tmp_path / "r.json")
        if outcome.code == 2:
            refused(outcome, "", tmp_path)
            continue
        assert outcome.code == 0, (outcome.err, content[:300])
        rows = [line for line in (pruned / CARD).read_text().splitlines() if re.search(r"of \d+ tokens \|", line)]
        assert rows, content[:300]
        assert {line.count(" | ") for line in rows} == {4}, content[:300]
        (pruned / "evaluation.json").unlink()


NAMES = (
    "../x",
    "a/../b",
    "a b/c",
    "a/b c",
    "https://x.co/me/x",
    "me/",
    "/me",
    "me//x",
    "me/x.git",
    "me/x\n",
    "~/x",
    ".",
)


@pytest.mark.parametrize("name", [*NAMES, "me\\x", "%2e/x", "me/..", "datasets/me/x", "\x1b[2J/x", "me/" + "x" * 97])
def test_names_that_no_repository_has(cli: Cli, folders: Path, hub: Hub, name: str) -> None:
    outcome = cli("push", folders / "pruned", name)
    assert outcome.code == 2
    assert "is not a repository's name. Write it as OWNER/NAME" in outcome.err
    assert "\x1b" not in outcome.err
    assert hub.asked == []


def test_a_folder_that_lost_its_weights(cli: Cli, folders: Path, hub: Hub, tmp_path: Path) -> None:
    pruned = shutil.copytree(folders / "pruned", tmp_path / "pruned")
    (pruned / "model.safetensors").unlink()
    for command in (("push", pruned, "me/x"), ("card", pruned)):
        refused(cli(*command), "holds no .safetensors weights", tmp_path)
    assert hub.asked == []
