"""A result as a file: one writer for each ending."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moescope.core.atomic import written_whole
from moescope.core.errors import InputError
from moescope.core.json_data import to_json

if TYPE_CHECKING:
    from moescope.core.result import Result

# Width of an image in CSS pixels, and pixels of a .png for each of them: 2,000 pixels print well over two columns.
_WIDTH, _SCALE = 1000, 2


def save(result: Result, target: Path) -> Path:
    """Write `result` to `target` in the format of its ending; the file appears whole or not at all.

    Raises:
        InputError: another ending, a folder that is not there, no figure for an image, or no browser to draw it with.
    """
    if target.suffix not in WRITERS:
        raise InputError(
            f"a result cannot be saved as {target.suffix or 'a file without an ending'}",
            expected=f"a path ending in {', '.join(WRITERS)}",
            found=str(target),
        )
    with written_whole(target) as partial:
        WRITERS[target.suffix](result, partial)
    return target


def _html(result: Result, path: Path) -> None:
    from moescope.core.html import page, result_section

    path.write_text(page(result.title, [result_section(result)]), encoding="utf-8")


def _png(result: Result, path: Path) -> None:
    path.write_bytes(_drawn(result, "png"))


def _svg(result: Result, path: Path) -> None:
    path.write_bytes(_drawn(result, "svg"))


def _drawn(result: Result, format: str) -> bytes:  # noqa: A002  plotly's own name for it
    figure = result.figure()
    try:
        import kaleido
        import kaleido.errors
    except ImportError as missing:
        raise InputError("images need kaleido", fix="pip install 'moescope[images]', or save as .html") from missing
    # The browser's pipe now and then holds a message cut short; it is skipped without harm, but logged with a traceback.
    logging.getLogger("choreographer").setLevel(logging.CRITICAL)
    try:
        options = {"format": format, "width": _WIDTH, "scale": _SCALE if format == "png" else 1}
        if figure.layout.height:
            options["height"] = figure.layout.height
        # Its page would ask another host for MathJax, and wait for it.
        image: bytes = kaleido.calc_fig_sync(figure.to_dict(), opts=options, kopts={"mathjax": False})
    except (RuntimeError, kaleido.errors.KaleidoError) as failure:
        browserless = isinstance(failure, kaleido.errors.ChromeNotFoundError)
        raise InputError(
            "images are drawn by Chrome or Chromium, and neither is here"
            if browserless
            else "the browser that draws images failed",
            found=None if browserless else str(failure)[:200],
            fix="install one (Debian: apt-get install chromium; anywhere: plotly_get_chrome), or save as .html",
        ) from failure
    return image


def _csv(result: Result, path: Path) -> None:
    result.df().to_csv(path, index=False)


def _parquet(result: Result, path: Path) -> None:
    import pyarrow.parquet as pq

    facts = {key.encode(): text.encode() for key, text in result.facts().items()}
    pq.write_table(result.table.replace_schema_metadata(facts), path)


def _json(result: Result, path: Path) -> None:
    path.write_text(to_json(result.as_json(), indent=1), encoding="utf-8")


WRITERS: dict[str, Callable[[Result, Path], None]] = {
    ".html": _html,
    ".png": _png,
    ".svg": _svg,
    ".csv": _csv,
    ".parquet": _parquet,
    ".json": _json,
}
