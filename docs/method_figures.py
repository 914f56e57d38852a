"""Draws the figures of docs/methods/ from recorded runs, and writes down what each example said.

    python docs/method_figures.py FOLDER [--record] [--analysis NAME …] [--out docs/images/methods]

The folder holds runs.duckdb, made by the commands of docs/method_recipes.py; `--record` runs those that were not run there yet.
An analysis that the store has no records for keeps the figure it has.
Needs the `images` extra and Chromium.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import kaleido
import numba
import numpy as np
from method_pages import FIGURES, IMAGES, figure_facts
from method_recipes import NOT_RUN, RECIPES, recipe_of
from numpy.typing import NDArray

from moescope.core.analysis import Analysis, analyses
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.store.store import Store

WIDTH, TALLEST = 900, 1100
LARGEST = 60_000  # bytes of a figure
_LOG = logging.getLogger("method_figures")


def main() -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--record", action="store_true", help="run the commands first that make the records")
    parser.add_argument("--analysis", action="append", help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, default=IMAGES)
    given = parser.parse_args()
    logging.basicConfig(level=logging.CRITICAL, format="%(message)s")  # the browser's own news is of no use here
    _LOG.setLevel(logging.INFO)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.record:
        record(given.folder)
    asked = given.analysis or [entry.name for entry in analyses]
    wanted = [one for one in sorted(analyses, key=lambda a: a.name) if one.name in asked and one.name not in NOT_RUN]
    drawn: dict[str, dict[str, Any]] = {}
    kaleido.start_sync_server(silence_warnings=True)  # one browser for all figures
    try:
        with Store(given.folder / "runs.duckdb", read_only=True) as store:
            for entry in wanted:
                if result := _asked(store, entry):
                    drawn[entry.name] = _facts(entry, result)
                    if result.has_figure:
                        _draw(result, given.out / f"{entry.name}.png")
    finally:
        kaleido.stop_sync_server()
    known = {entry.name for entry in analyses}
    facts = figure_facts() | drawn
    kept = {name: facts[name] for name in sorted(facts) if name in known - set(NOT_RUN)}
    FIGURES.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def record(folder: Path) -> None:
    """Run the commands of every recipe in a folder, each once; those that ran there are named in its commands.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "commands.txt"
    ran = done.read_text(encoding="utf-8").splitlines() if done.exists() else []
    program = str(Path(sys.executable).parent / "moescope")
    needed = [RECIPES[recipe_of(entry)] for entry in analyses if entry.name not in NOT_RUN]
    for recipe in needed:
        for command in recipe.commands:
            if command not in ran:
                _LOG.info("%s", command)
                words = [program if word == "moescope" else word for word in shlex.split(command)]
                subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL)  # noqa: S603  our own commands
                ran.append(command)
                done.write_text("\n".join(ran) + "\n", encoding="utf-8")


def _asked(store: Store, entry: Analysis) -> Result | None:
    recipe = RECIPES[recipe_of(entry)]
    try:
        return entry([store.run(name) for name in recipe.runs], recipe.parameters.get(entry.name, {}))
    except InputError as reason:
        _LOG.info("%s: left out: %s", entry.name, reason)
        return None


def _facts(entry: Analysis, result: Result) -> dict[str, Any]:
    """What a page tells beside the figure."""
    return {
        "title": result.title,
        "runs": list(RECIPES[recipe_of(entry)].runs),
        "figure": result.has_figure,
        "n": result.n,
        "n_unit": result.n_unit,
        "definition": result.definition,
        "units": dict(result.units),
        "interval": result.interval,
        "null": result.null,
    }


def _draw(result: Result, target: Path) -> None:
    figure = result.figure()
    if figure.layout.height and figure.layout.height > TALLEST:
        figure.update_layout(height=TALLEST)
    image = kaleido.calc_fig_sync(figure, opts={"format": "png", "width": WIDTH, "scale": 1})
    pixels = _pixels(image)
    for colours in (256, 64, 24):
        small = in_colours(pixels, colours)
        if len(small) <= LARGEST:
            break
    target.write_bytes(small)
    _LOG.info("%s %d kB%s", target.name, len(small) // 1000, "" if len(small) <= LARGEST else "  TOO LARGE")


def in_colours(pixels: NDArray[np.uint8], most: int) -> bytes:
    """[row, column, 3] as a PNG of at most so many colours, the most frequent ones; other pixels take the nearest of them."""
    height, width, _ = pixels.shape
    colours, place, count = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    palette, nearest = _palette(colours, count, most)
    rows = nearest[place.reshape(-1)].reshape(height, width)
    body = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"PLTE", palette.tobytes()), (b"IDAT", zlib.compress(body, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _palette(
    colours: NDArray[np.uint8], count: NDArray[np.int64], most: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """At most `most` colours, and for each of `colours` the number of the nearest."""
    if len(colours) <= most:
        return colours, np.arange(len(colours), dtype=np.uint8)
    order = np.argsort(-count, kind="stable")
    # Surfaces first, which are the most frequent; then the most frequent colour of each small cube of the colour space.
    for bits in (5, 4, 3):
        cube = (colours >> (8 - bits)).astype(np.int64) @ np.array([1 << 2 * bits, 1 << bits, 1])
        first = np.sort(np.unique(cube[order], return_index=True)[1])
        if len(first) <= most - most // 4:
            break
    chosen = list(dict.fromkeys([*range(most // 4), *first.tolist()]))[:most]
    kept = colours[order][chosen]
    distance = ((colours[:, None].astype(np.int32) - kept[None].astype(np.int32)) ** 2).sum(-1)
    return kept, distance.argmin(1).astype(np.uint8)


def _pixels(png: bytes) -> NDArray[np.uint8]:
    """[row, column, 3] of a PNG with 8 bits a channel, over white where it lets the page through."""
    at, data, width, height, channels = 8, b"", 0, 0, 0
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        at += 12 + length
        if kind == b"IHDR":
            width, height, _, colour = struct.unpack(">IIBB", body[:10])
            channels = {2: 3, 6: 4}[colour]
        elif kind == b"IDAT":
            data += body
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, 1 + width * channels)
    raw = _unfiltered(rows, channels).reshape(height, width, channels)
    if channels == 3:
        return raw
    alpha = raw[..., 3:].astype(np.float64) / 255
    return np.round(raw[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


@numba.njit(cache=False)
def _unfiltered(rows, step):  # type: ignore[no-untyped-def]  # pragma: no cover  numba compiles it from the arrays it is given
    """Undo the row filters of PNG (section 9 of its specification)."""
    height, width = rows.shape[0], rows.shape[1] - 1
    out = np.zeros((height, width), np.uint8)
    for y in range(height):
        kind = rows[y, 0]
        for x in range(width):
            left = int(out[y, x - step]) if x >= step else 0
            up = int(out[y - 1, x]) if y else 0
            corner = int(out[y - 1, x - step]) if y and x >= step else 0
            add = 0
            if kind == 1:
                add = left
            elif kind == 2:
                add = up
            elif kind == 3:
                add = (left + up) // 2
            elif kind == 4:
                guess = left + up - corner
                a, b, c = abs(guess - left), abs(guess - up), abs(guess - corner)
                add = left if a <= b and a <= c else (up if b <= c else corner)
            out[y, x] = (int(rows[y, x + 1]) + add) & 255
    return out


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


if __name__ == "__main__":
    main()
