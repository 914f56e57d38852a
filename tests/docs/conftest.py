"""The pages, and a folder with the files that their code works on."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TEXTS = 24  # of the bundled corpus, some of each label


def _loaded(name: str) -> ModuleType:
    path = Path(__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"moescope_tests_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


DOCUMENTED = _loaded("documented")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take a `page` run once for every page that has something for them."""
    if "page" in metafunc.fixturenames:
        pages = DOCUMENTED.written_pages()
        metafunc.parametrize("page", pages, ids=[str(page.relative_to(DOCUMENTED.ROOT)) for page in pages])


@pytest.fixture(scope="session")
def documented() -> ModuleType:
    """The module `documented.py`."""
    return DOCUMENTED


@pytest.fixture(scope="session")
def few_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short corpus in place of the bundled one: texts of every label, cut to 60 words."""
    from moescope.probes.demo import CORPUS_PATH

    records = [json.loads(line) for line in CORPUS_PATH.read_text(encoding="utf-8").splitlines()]
    chosen = records[:: len(records) // TEXTS][:TEXTS]
    path = tmp_path_factory.mktemp("texts") / "corpus.jsonl"
    lines = (json.dumps({"text": " ".join(r["text"].split(" ")[:60]), "label": r["label"]}) for r in chosen)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def recorded(few_texts: Path, tmp_path_factory: pytest.TempPathFactory, demo_model: Any) -> Path:
    """A folder with the files that pages name: texts, prompts, a store with the run `base`, and a routing trace."""
    import moescope as ms

    folder = tmp_path_factory.mktemp("recorded")
    lines = few_texts.read_text(encoding="utf-8").splitlines(keepends=True)
    for name in ("corpus.jsonl", "texts.jsonl", "prompts.jsonl"):
        (folder / name).write_text("".join(lines), encoding="utf-8")
    (folder / "rude.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
    (folder / "kind.jsonl").write_text("".join(lines[8:16]), encoding="utf-8")
    for name in ("rude", "kind"):
        texts = [
            json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        (folder / f"{name}.txt").write_text("\n".join(" ".join(t.split()) for t in texts) + "\n", encoding="utf-8")
    ms.Intervention([ms.edits.Ablate(layer=3, experts=[5])], name="cut").save(folder / "cut.json")
    with ms.Store(folder / "runs.duckdb") as store:
        ms.record(demo_model, str(folder / "corpus.jsonl"), store, name="base", progress=False)
        query = """
            SELECT sequence_id, position, layer, experts, weights, label
            FROM routing JOIN tokens USING (run_id, token) JOIN sequences USING (run_id, sequence_id)
        """
        store.sql(query).to_arrow_table()
        store.connection.execute(f"COPY ({query}) TO '{folder / 'trace.parquet'}' (FORMAT parquet)")
    return folder


@pytest.fixture
def workplace(recorded: Path, few_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of `recorded` as the current folder; the bundled corpus is the short one."""
    import moescope.probes.demo as demo

    place = tmp_path / "place"
    shutil.copytree(recorded, place)
    monkeypatch.chdir(place)
    monkeypatch.setattr(demo, "CORPUS_PATH", few_texts)
    monkeypatch.setenv("COLUMNS", "200")
    with _as_they_were():
        yield place
    shutil.rmtree(place)


@contextmanager
def _as_they_were() -> Iterator[None]:
    """What pages register is gone afterwards: other tests count what the project itself has."""
    from moescope.core.analysis import analyses
    from moescope.core.pages import pages
    from moescope.core.probe import probes
    from moescope.probes import custom_layers

    registries: list[Any] = [analyses, pages, probes]
    for registry in registries:
        registry.names()  # all of the project's own are found first
    kept = [dict(registry._items) for registry in registries]  # a registry gives nothing up by itself
    layers = dict(custom_layers._REGISTERED)
    try:
        yield
    finally:
        for registry, items in zip(registries, kept, strict=True):
            registry._items = items
        custom_layers._REGISTERED.clear()
        custom_layers._REGISTERED.update(layers)
