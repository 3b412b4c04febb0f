"""Charts as a picture in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_bytes, write_text
from sparsedeploy.reporting.charts import Chart, svg_file


def check_picture(path: Path) -> None:
    """Refuse what no picture can be written to.

    Raises:
        UserError: another ending than ``.svg`` or ``.png``, or no renderer for PNG.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise UserError(f"plot {path} is neither .svg nor .png", "Name it, for example, plan.svg.")
    if path.suffix.lower() == ".png":
        try:
            import resvg_py  # noqa: F401
        except ImportError as error:
            raise UserError(
                "PNG plots need resvg", "Install it: pip install 'sparsedeploy[plot]'; or name the file .svg."
            ) from error


def save_picture(charts: Sequence[Chart], path: Path) -> None:
    """Draw charts below each other into a file.

    Raises:
        UserError: see :func:`check_picture`; also a file that cannot be written.
    """
    check_picture(path)
    picture = svg_file(charts)
    if path.suffix.lower() == ".svg":
        write_text(path, picture)
        return
    import resvg_py

    write_bytes(path, bytes(resvg_py.svg_to_bytes(svg_string=picture, zoom=2)))
