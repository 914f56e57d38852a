"""A Markdown report and the images beside it, written together or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moescope.core.atomic import written_whole
from moescope.core.errors import InputError
from moescope.report.document import Answer, Document
from moescope.report.markdown_page import markdown_page
from moescope.report.read_back import manifest_of

_WIDTH, _SCALE = 1000, 1.5


def save_markdown(document: Document, target: Path, *, tell: Callable[[str], None] | None = None) -> list[str]:
    """Write `report.md` and the folder `report_files`; without what draws images, the tables alone.

    Returns:
        What the reader must know: why there are no images.
    """
    folder = target.with_name(f"{target.stem}_files")
    if folder.exists() and not _ours(folder, target):
        raise InputError(
            f"cannot write {folder}",
            found="something that no report wrote",
            fix="move it, or name the report otherwise",
        )
    made = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    drawn = [answer for answer in document.answers if answer.result.has_figure]
    notes: list[str] = []
    try:
        with written_whole(target) as partial:
            made.mkdir()
            try:
                (tell or (lambda _: None))("images")
                _draw(drawn, made)
            except InputError as reason:
                notes.append(f"no images: {reason}")
                drawn = []
            images = {answer.anchor: f"{quote(folder.name)}/{answer.anchor}.png" for answer in drawn}
            sums = {a.anchor: hashlib.sha256((made / f"{a.anchor}.png").read_bytes()).hexdigest() for a in drawn}
            told = dataclasses.replace(document, manifest={**document.manifest, "images": sums})
            partial.write_text(markdown_page(told, images), encoding="utf-8")
            _in_place(made, folder, keep=bool(drawn))
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return notes


def _ours(folder: Path, report: Path) -> bool:
    """Whether a folder holds nothing but images that the report before lists as its own."""
    try:
        images = manifest_of(report).get("images")
    except InputError:  # none there, or a file of another kind
        images = None
    known = set(images) if isinstance(images, dict) else set()
    return (
        folder.is_dir()
        and not folder.is_symlink()
        and all(entry.suffix == ".png" and entry.is_file() and entry.stem in known for entry in folder.iterdir())
    )


def _in_place(made: Path, folder: Path, *, keep: bool) -> None:
    """Let the new folder take the place of the old one."""
    if folder.exists():
        shutil.rmtree(folder)
    if keep:
        made.replace(folder)


def _draw(answers: Sequence[Answer], folder: Path) -> None:
    """One image a figure, all by one browser."""
    try:
        import kaleido
        import kaleido.errors
    except ImportError as missing:
        raise InputError("they need kaleido", fix="pip install 'moescope[images]'") from missing
    logging.getLogger("choreographer").setLevel(logging.CRITICAL)
    try:
        kaleido.write_fig_from_object_sync(
            [_picture(answer, folder / f"{answer.anchor}.png") for answer in answers],
            kopts={"mathjax": False},  # its page would ask another host for it, and wait
        )
    except (RuntimeError, kaleido.errors.KaleidoError) as failure:
        raise InputError(
            "Chrome or Chromium, which draws them, is not here or failed",
            found=str(failure).splitlines()[0][:160] if str(failure) else None,
            fix="install one (Debian: apt-get install chromium)",
        ) from failure


def _picture(answer: Answer, path: Path) -> dict[str, Any]:
    figure = answer.result.figure()
    options = {"format": "png", "width": _WIDTH, "scale": _SCALE}
    if figure.layout.height:
        options["height"] = figure.layout.height
    return {"fig": figure.to_dict(), "path": str(path), "opts": options}
