"""A real kernel: what a saved notebook keeps of figures, progress and mistakes, and that it is small and needs no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

CELLS = (
    """
    import moescope as ms
    model = ms.load("demo")
    store = ms.Store("runs.duckdb")
    corpus = ms.Corpus.load([{"text": d.text, "label": d.label} for d in list(ms.Corpus.load("demo"))[:40]])
    run = ms.record(model, corpus, store, name="base")
    """,
    "run", "store", "corpus", "model", "model.anatomy", "run.coverage", "ms.plan(model, corpus)",
    'ms.analyze(run, "load")',
    'ms.analyze(run, "router_entropy")',
    'ms.analyze(run, "specialization")',
    'ms.analyze(run, "expert_atlas")',
    'ms.analyze(run, "local_consistency").figure()',
    'ms.analyze(run, "lod")',
)  # fmt: skip
FIGURES = 5


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The notebook of the cells above, run by a kernel and saved."""
    import textwrap

    import nbclient
    import nbformat

    folder = tmp_path_factory.mktemp("notebook")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(textwrap.dedent(code).strip()) for code in CELLS])
    nbclient.NotebookClient(
        book, timeout=300, allow_errors=True, resources={"metadata": {"path": str(folder)}}
    ).execute()
    nbformat.write(book, folder / "saved.ipynb")
    return book, folder / "saved.ipynb"


def _outputs(book: Any, source: str) -> list[Any]:
    (cell,) = [cell for cell in book.cells if cell.source.endswith(source)]
    return list(cell.outputs)


@pytest.mark.slow
def test_five_figures_are_kept_as_pictures_in_less_than_a_megabyte(notebook: tuple[Any, Path]) -> None:
    from moescope.core.kernel import in_notebook

    assert not in_notebook()
    book, saved = notebook
    shown = [o for cell in book.cells for o in cell.outputs if o.output_type in ("display_data", "execute_result")]
    figures = [o for o in shown if o.data.get("text/plain", "").startswith("Figure: ")]
    assert len(figures) == FIGURES
    if not any("image/png" in figure.data for figure in figures):
        pytest.skip("no browser is here")
    assert all("image/png" in figure.data for figure in figures)
    assert saved.stat().st_size < 1_000_000


@pytest.mark.slow
def test_the_saved_notebook_has_no_script_and_fetches_nothing(notebook: tuple[Any, Path]) -> None:
    book, _ = notebook
    for cell in book.cells:
        for output in cell.outputs:
            kept = json.dumps(output)
            assert "<script" not in kept.lower()
            assert "<link" not in kept.lower()
            assert (
                "cdn" not in json.dumps({k: v for k, v in output.get("data", {}).items() if k != "image/png"}).lower()
            )
            assert "application/javascript" not in output.get("data", {})


@pytest.mark.slow
def test_progress_is_one_line_and_nothing_is_said_of_widgets(notebook: tuple[Any, Path]) -> None:
    book, _ = notebook
    first, *others = book.cells
    lines = [o.data["text/plain"] for o in first.outputs if o.output_type == "display_data"]
    assert len(lines) == 1
    assert lines[0].startswith("recording base: 100%")
    assert len(lines[0].splitlines()) == 1
    assert not [o.text for cell in (first, *others) for o in cell.outputs if o.output_type == "stream"]


@pytest.mark.slow
def test_a_result_shows_its_finding_then_the_figure_then_the_rows(notebook: tuple[Any, Path]) -> None:
    finding, figure, rows = _outputs(notebook[0], '"load")')
    assert "<h4>" in finding.data["text/html"]
    assert figure.data["text/plain"].startswith("Figure: ")
    assert "<thead>" in rows.data["text/html"]
    assert "How to read this" in rows.data["text/html"]


@pytest.mark.slow
def test_a_mistake_is_told_in_a_few_lines(notebook: tuple[Any, Path]) -> None:
    (error,) = _outputs(notebook[0], '"lod")')
    assert error.output_type == "error"
    assert 'Line 1: ms.analyze(run, "lod")' in error.traceback[0]
    assert len("\n".join(error.traceback).splitlines()) <= 8
    assert "did you mean 'load'" in "\n".join(error.traceback)
