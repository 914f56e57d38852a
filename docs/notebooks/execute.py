"""Make the notebooks beside this file from their sources, run them, and save them with clean outputs.

    python docs/notebooks/execute.py                    # all of them
    python docs/notebooks/execute.py 03-who-is-this-expert
    python docs/notebooks/execute.py --prose            # text alone: outputs stay, code must be what was run

Sources are Python files with `# %%` before each cell and `# %% [markdown]` before each passage of text, which most editors
open as notebooks. Saved outputs hold no timings, no paths of this machine and no progress, so that two runs differ where numbers do.
"""

from __future__ import annotations

import base64
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat

HERE = Path(__file__).parent
SOURCES = HERE / "sources"
NAMES = tuple(sorted(path.stem for path in SOURCES.glob("*.py")))
SECONDS = 180
PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"

_MARK = re.compile(r"^# %%(?P<kind> \[markdown\])?$", re.MULTILINE)
_TAKEN = re.compile(r"^(\s*)# ?", re.MULTILINE)
_PLACES = re.compile(r"(/tmp/|/var/folders/)[\w./-]*|0x[0-9a-f]{6,}")


def cells(name: str) -> list[tuple[str, str]]:
    """Kind (`markdown` or `code`) and text of each cell of a notebook's source."""
    text = (SOURCES / f"{name}.py").read_text(encoding="utf-8")
    marks = list(_MARK.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    found = []
    for mark, end in zip(marks, ends, strict=True):
        body = text[mark.end() : end].strip("\n")
        kind = "markdown" if mark["kind"] else "code"
        found.append((kind, _paragraphs(_TAKEN.sub(r"\1", body)) if kind == "markdown" else body))
    return found


def _paragraphs(text: str) -> str:
    """Lines of one paragraph joined, since notebooks wrap by themselves; lists, headings and code stay."""
    joined = re.sub(r"(?<=\S)\n(?=[^\s#>|`-])", " ", text)
    return re.sub(r"(?<=\S)\n {2}(?=\S)", " ", joined)


def notebook(name: str) -> nbformat.NotebookNode:
    """The notebook of a source, not run."""
    made = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    makers = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    made.cells = [makers[kind](text, id=f"cell-{at:02d}") for at, (kind, text) in enumerate(cells(name))]
    made.nbformat, made.nbformat_minor = 4, 5
    return made


def executed(name: str, *, folder: Path = HERE, then: str = "") -> nbformat.NotebookNode:
    """The notebook of a source, run from top to bottom in a kernel of its own.

    Args:
        name: of the source.
        folder: where the kernel runs.
        then: code of one more cell that runs after the last.
    """
    from nbclient import NotebookClient

    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network
    made = notebook(name)
    if then:
        made.cells.append(nbformat.v4.new_code_cell(then, id="then"))
    NotebookClient(made, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return made


def cleaned(made: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Outputs without progress, warnings, addresses in memory and paths of this machine."""
    for cell in made.cells:
        cell.metadata = nbformat.NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = [_clean(output) for output in cell.outputs if not _is_noise(output)]
    return made


def _is_noise(output: Any) -> bool:
    if output.output_type == "stream":
        return True
    # A line that is updated in place while something runs is text alone; what a cell shows has a table or a picture too.
    return output.output_type == "display_data" and set(output.data) == {"text/plain"}


def _clean(output: Any) -> Any:
    data = output.data
    if PLOTLY in data and PNG not in data:
        _add_picture(output)
    for kind in list(data):
        if isinstance(data[kind], str) and kind.startswith("text/"):
            data[kind] = _PLACES.sub("…", data[kind]).replace(str(Path.home()), "~").replace(' border="1"', "")
    sizes = {PNG: output.metadata[PNG]} if PNG in output.metadata else {}
    output.metadata = nbformat.from_dict(sizes)
    return output


def _add_picture(output: Any) -> None:
    """The picture that a figure drawn by hand has not: code hosts and the built pages show no other form of it."""
    import plotly.graph_objects as go

    from moescope.core.picture import png_of, size_of

    figure = go.Figure(output.data[PLOTLY])
    picture = png_of(figure)
    if picture is None:
        raise SystemExit("no picture of a figure: install the extra `images`, and Chrome or Chromium")
    width, height = size_of(figure)
    output.data[PNG] = base64.b64encode(picture).decode("ascii")
    output.data["text/plain"] = f"Figure: {figure.layout.title.text}"
    output.metadata = {PNG: {"width": width, "height": height}}


def with_new_prose(name: str) -> nbformat.NotebookNode:
    """The notebook of a source with the outputs that were saved, where only text changed since.

    Raises:
        SystemExit: code changed too, so it must run.
    """
    made = notebook(name)
    old = [cell for cell in nbformat.read(HERE / f"{name}.ipynb", as_version=4).cells if cell.cell_type == "code"]
    new = [cell for cell in made.cells if cell.cell_type == "code"]
    if [cell.source for cell in old] != [cell.source for cell in new]:
        raise SystemExit(f"{name}: code changed; run it without --prose")
    for here, there in zip(new, old, strict=True):
        here.execution_count, here.outputs = there.execution_count, there.outputs
    return made


def main(arguments: list[str]) -> None:
    """Run and save."""
    names = [argument for argument in arguments if argument != "--prose"] or NAMES
    for name in names:
        began = time.monotonic()
        made = cleaned(with_new_prose(name) if "--prose" in arguments else executed(name))
        text = nbformat.writes(made)
        (HERE / f"{name}.ipynb").write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
        seconds = time.monotonic() - began
        sys.stderr.write(f"{name}: {seconds:.0f} s, {len(text) / 1000:.0f} kB\n")


if __name__ == "__main__":
    main(sys.argv[1:])
