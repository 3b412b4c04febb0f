"""The job ``push``: verify a folder and put it on a hub (huggingface.co, or the one that HF_ENDPOINT names)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsedeploy import progress
from sparsedeploy.artifacts.description import ARTIFACT_FILE, load_artifact
from sparsedeploy.checkpoint.card import CARD
from sparsedeploy.checkpoint.inspection import check_files
from sparsedeploy.checkpoint.manifest import MANIFEST, load_manifest
from sparsedeploy.errors import UserError, add_hint
from sparsedeploy.hub import hub_refusal, unreachable
from sparsedeploy.reading import inside
from sparsedeploy.workflows.card import write_card
from sparsedeploy.workflows.options import PushOptions

# What a repository may hold before it counts as used.
_NEW = {".gitattributes", CARD}


@dataclass(frozen=True)
class Pushed:
    """What was sent.

    Attributes:
        url: of the commit.
        files, bytes: of the folder.
    """

    repo: str
    url: str
    files: int
    bytes: int


def push(folder: Path, repo: str, options: PushOptions) -> Pushed:
    """Send a folder of ours, verified, as one commit.

    Raises:
        UserError: a folder that is not ours or was changed, no token, a name that the hub does not take, a repository
            with other content, or a hub that refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import disable_progress_bars, validate_repo_id

    files = _files(folder)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(
            f"'{repo}' is not a repository's name", "Write it as OWNER/NAME, such as me/model-70."
        ) from error
    if "/" not in repo:
        raise UserError(f"'{repo}' names no owner", f"Write it as OWNER/NAME, such as me/{repo}.")
    if get_token() is None:
        raise UserError(f"there is no token for {constants.ENDPOINT}", "Run: hf auth login, or set HF_TOKEN.")
    _verify(folder)
    if not (folder / CARD).is_file() and (folder / MANIFEST).is_file():
        write_card(folder)
        files = _files(folder)
    disable_progress_bars()
    size = sum((folder / name).stat().st_size for name in files)
    hub = HfApi()
    sends = False
    try:
        hub.create_repo(repo, private=options.private or None, exist_ok=True)
        there = {each for each in hub.list_repo_files(repo) if each not in _NEW}
        if there and not options.overwrite:
            raise UserError(
                f"{repo} holds {len(there)} files already, such as {min(there)}",
                "Pass --overwrite to replace them in a new commit, or choose another name.",
            )
        progress.note(f"send {len(files)} files, {size / 1e6:,.1f} MB, to {constants.ENDPOINT}/{repo}")
        sends = True
        info = hub.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[_literal(name) for name in files],
            delete_patterns="*" if options.overwrite else None,
            commit_message=options.message or f"Add {folder.resolve().name}",
        )
    except UserError:
        raise
    except Exception as error:
        if "xet-write-token" in str(error) and unreachable(error):
            raise UserError(
                f"{constants.ENDPOINT} takes no files by Xet", "Set HF_HUB_DISABLE_XET=1 to send them by Git LFS."
            ) from error
        refusal = hub_refusal(error, constants.ENDPOINT, _known(repo))
        if refusal is None:
            raise
        if sends:
            add_hint(refusal, "What has arrived is not sent again by the same command.")
        raise refusal from error
    return Pushed(repo, str(info.commit_url), len(files), size)


def _files(folder: Path) -> list[str]:
    """What is sent: every file but hidden ones.

    Raises:
        UserError: not a folder of ours, or a link out of it.
    """
    if not (folder / MANIFEST).is_file() and not (folder / ARTIFACT_FILE).is_file():
        raise UserError(
            f"{folder} has neither {MANIFEST} nor {ARTIFACT_FILE}", "Name a folder that prune, recover or export wrote."
        )
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or not path.is_file():
            continue
        if path.is_symlink() and not inside(folder, path):
            raise UserError(f"{path} is a link out of its folder", "Put the file itself there, or remove it.")
        found.append(name.as_posix())
    return found


def _verify(folder: Path) -> None:
    """Refuse what is not as it was written."""
    if (folder / ARTIFACT_FILE).is_file():
        load_artifact(folder, verify=True)
        return
    problems: list[str] = []
    check_files(folder, load_manifest(folder), problems)
    if problems:
        raise UserError(f"{folder} differs from its manifest: {problems[0]}", "Prune the model again.")


def _known(repo: str) -> Mapping[int, tuple[str, str]]:
    """What a hub means by an answer to files that are sent, and what to do."""
    return {
        401: ("does not accept the token", "Run: hf auth login, or set HF_TOKEN to a token that may write."),
        402: ("wants a paid plan for that", "Make the repository public, or see its billing page."),
        403: (f"does not let this token write to {repo}", "Use your own name, or a token that may write."),
        404: (f"knows no {repo}", "Check the name; with a private one, the token."),
        409: (f"refuses because {repo} was changed meanwhile", "Run the same command again."),
        413: ("finds a file too large", "Ask for a larger quota, or export with --quantize."),
    }


def _literal(name: str) -> str:
    """A pattern that matches that name only."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
