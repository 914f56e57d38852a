"""`moescope.sae`: its names, and the functions that measure and answer at once."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import moescope as ms
from moescope.core.errors import InputError
from moescope.core.result import Result


@pytest.mark.parametrize("name", ms.sae.__all__)
def test_every_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(ms.sae, name)
    assert callable(value)
    assert (inspect.getdoc(value) or "").split("\n")[0].rstrip().endswith((".", "?"))


@pytest.mark.parametrize("name", ms.sae.__all__)
def test_functions_describe_every_parameter(name: str) -> None:
    value = getattr(ms.sae, name)
    if inspect.isclass(value):
        return
    told = inspect.getdoc(value) or ""
    for parameter in inspect.signature(value).parameters:
        assert f"{parameter}:" in told or f"{parameter}, " in told or f"`{parameter}`" in told, f"{name}({parameter})"


def test_names_stay_functions_after_the_parts_are_loaded() -> None:
    """A part's folder that is imported must not take the place of a function of its name."""
    kinds = {name: type(getattr(ms.sae, name)) for name in ms.sae.__all__}
    import moescope.sae_api

    assert moescope.sae_api
    assert {name: type(getattr(ms.sae, name)) for name in ms.sae.__all__} == kinds
    assert not any(inspect.ismodule(getattr(ms.sae, name)) for name in ms.sae.__all__)


def test_unknown_name_is_told_with_those_there_are() -> None:
    with pytest.raises(AttributeError, match="judge"):
        _ = ms.sae.jugde


def test_names_load_nothing_heavy_until_they_are_used() -> None:
    code = "import moescope as ms, sys; dir(ms.sae); print(sorted({'torch', 'sae_lens'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_saelens_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from moescope.sae import saelens

    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"'moescope\[sae\]'"):
        saelens.need_saelens()
    with pytest.raises(InputError, match=r"'moescope\[sae\]'"):
        ms.sae.published("release", "id")


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Result]]:
    """A small study of the demo model: the store, and what it found."""
    path = tmp_path_factory.mktemp("study") / "sae.duckdb"
    texts = [{"text": t, "label": label} for label, t in _texts()]
    with ms.Store(path) as store:
        done = ms.sae.study(
            ms.load("demo"), texts, store, site="blocks.2.hook_mlp_out", specs=["topk:d=64,k=4", "topk:d=32,k=4"],
            vectors=2000, judged_tokens=300, progress=False,
        )  # fmt: skip
        return path, list(done.results)


def _texts() -> list[tuple[str, str]]:
    from moescope.probes.corpus import Corpus

    return [(str(d.label), d.text[:400]) for n, d in enumerate(Corpus.load("demo")) if n % 3 == 0][:60]


@pytest.mark.slow
def test_a_study_answers_every_question_of_each_autoencoder(studied: tuple[Path, list[Result]]) -> None:
    names = [result.name for result in studied[1]]
    each = ["sae_quality", "features", "top_features", "expert_features", "feature_writers"]
    assert names == [*each, *each, "sae_comparison"]
    assert all(len(result.df()) for result in studied[1])


@pytest.mark.slow
def test_a_study_that_ended_is_not_repeated(studied: tuple[Path, list[Result]]) -> None:
    path, _ = studied
    texts = [{"text": t, "label": label} for label, t in _texts()]
    with ms.Store(path) as store:
        before = store.fetch("SELECT sae_id, checksum FROM saes ORDER BY 1")
        done = ms.sae.study(
            ms.load("demo"), texts, store, site="blocks.2.hook_mlp_out", specs=["topk:d=64,k=4", "topk:d=32,k=4"],
            vectors=2000, judged_tokens=300, progress=False,
        )  # fmt: skip
        assert store.fetch("SELECT sae_id, checksum FROM saes ORDER BY 1") == before
        assert len(store.runs()) == 1
        assert {a.name for a in done.autoencoders} == {"study-1", "study-2"}


@pytest.mark.slow
def test_a_report_of_a_studied_run_shows_autoencoders(studied: tuple[Path, list[Result]], tmp_path: Path) -> None:
    with ms.Store(studied[0], read_only=True) as store:
        page = ms.write_report(store.run("study"), tmp_path / "report.html").read_text()
    assert "Sparse autoencoders and their features" in page
    assert "study-2" in page


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"site": "blocks.99.hook_mlp_out"}, "blocks.99"),
        ({"site": "nowhere"}, "is not a site"),
        ({"site": "blocks.1.hook_mlp_out", "specs": []}, "at least one autoencoder"),
        ({"site": "blocks.1.hook_mlp_out", "specs": ["topk:q=1"]}, "q"),
    ],
)
def test_what_cannot_be_studied_is_told_before_anything_runs(
    tmp_path: Path, asked: dict[str, object], words: str
) -> None:
    with ms.Store(tmp_path / "sae.duckdb") as store:
        with pytest.raises(InputError, match=words):
            ms.sae.study(ms.load("demo"), ["Hello there, world."] * 4, store, progress=False, **asked)
        assert not store.runs()
