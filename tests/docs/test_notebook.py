"""The notebook: its cells run as they stand, and the figures that it shows are in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsedeploy.runtimes.environments import Environment, status

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebook.ipynb"


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_figures_are_embedded() -> None:
    """Every code cell was executed in order, none failed, and the pictures are in the file."""
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    pictures = [output for output in outputs if "image/svg+xml" in output.get("data", {})]
    assert len(pictures) == 3
    assert all("".join(picture["data"]["image/svg+xml"]).startswith("<svg ") for picture in pictures)
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "/home/" not in text
    assert "/work/" not in text


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.usefixtures("one_core")
def test_cells_run(deepsparse_runtime: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By nbclient where it is installed, else one after another in this process."""
    server = Path(status("deepsparse").path) / "env"
    if not list(server.glob("lib/python*/site-packages/fastapi")):
        pytest.skip("needs: sparsedeploy runtime install deepsparse --with server (350 MB)")
    monkeypatch.chdir(tmp_path)
    try:
        import nbformat
        from nbclient import NotebookClient
    except ImportError:
        namespace: dict[str, object] = {}
        for at, cell in enumerate(cells()):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"cell {at}", "exec"), namespace)
    else:
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    assert list(tmp_path.iterdir()) == []
