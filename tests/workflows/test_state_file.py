"""What a job keeps between its runs: resumed from as it was written, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.workflows.state_file import read_state, write_state
from tests.cli.mutations import changed, mutations, places, unless_refused

STATE = {
    "request": {"model": "m", "rates": [0.5, 0.7], 3: "a number as a key"},
    "trials": [{"rate": 0.5, "perplexity": 10.123456789012345, "reason": None}],
    "done": True,
}
PLAIN = json.loads(json.dumps(STATE))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_state(tmp_path / "state.json", STATE)
    assert read_state(tmp_path / "state.json", fix="Delete it.") == PLAIN


def test_what_was_edited_is_refused(tmp_path: Path) -> None:
    """Every value in every place, and every damage to the file; other white space or order changes nothing."""
    path = tmp_path / "state.json"
    write_state(path, STATE)
    sound = path.read_bytes()
    for content in mutations(sound, 300, 51):
        path.write_bytes(content)
        found = unless_refused(lambda: read_state(path, fix="Delete it."))
        assert found is None or found == PLAIN, content[:300]
    path.write_text(json.dumps(dict(reversed(json.loads(sound).items()))))
    assert read_state(path, fix="Delete it.") == PLAIN
    place = next(place for place in places(PLAIN) if place[-1] == "perplexity")
    path.write_text(json.dumps(changed(json.loads(sound), place, 9.0)))
    with pytest.raises(UserError, match=r"state.json was edited or is damaged .* Delete it"):
        read_state(path, fix="Delete it.")
