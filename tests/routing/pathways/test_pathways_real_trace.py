"""The released trace of DeepSeek-V2-Lite: every analysis of pathways and serving on real decisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from moescope.analysis_api import analyze
from moescope.routing.trace import read_trace
from moescope.store.run import Run
from moescope.store.store import Store

TRACE = Path("/work/shared/data/deepseek_v2_lite_routing/law.parquet")
pytestmark = pytest.mark.skipif(not TRACE.exists(), reason="the released trace is not on this machine")


@pytest.fixture(scope="module")
def law(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with Store(tmp_path_factory.mktemp("law") / "law.duckdb") as store:
        yield store.import_trace(TRACE, name="law", n_experts=64)


def test_layers_tell_of_each_other(law: Run) -> None:
    result = analyze(law, "affinity", draws=50, shuffles=2)
    frame = result.df()
    assert result.n == 8327 * 25
    bits = frame[frame["metric"] == "mutual information"]
    assert (bits["ci_low"] > bits["null"]).all()
    trace = read_trace(law)
    first, second = trace.routers[0].experts[:, 0].tolist(), trace.routers[1].experts[:, 0].tolist()
    joint = Counter(zip(first, second, strict=True))
    followed = sum(max(n for (i, _), n in joint.items() if i == expert) for expert in set(first))
    assert frame[frame["metric"] == "affinity"]["value"].iloc[0] == pytest.approx(followed / 8327)


def test_layers_predict_each_other_on_new_documents(law: Run) -> None:
    result = analyze(law, "predictability", sample=100, draws=50)
    means = result.df().groupby("predictor")["value"].mean()
    assert means["previous layer"] > 1.5 * means["popularity"]
    assert "token id" not in means


def test_paths_repeat_more_than_independent_layers_would_have_it(law: Run) -> None:
    frame = analyze(law, "paths", samples=1, draws=20).df().set_index("metric")
    assert frame.loc["distinct paths", "value"] < 0.8 * frame.loc["distinct paths", "null"]


def test_affinity_placement_saves_crossings_on_new_documents(law: Run) -> None:
    frame = analyze(law, "placement", draws=20).df()
    crossings = frame[frame["metric"] == "crossings a token"].set_index("placement")
    assert crossings.loc["affinity", "ci_high"] < crossings.loc["affinity", "null_low"]
    assert crossings["null"].iloc[0] == pytest.approx(25 * 0.75, abs=0.3)


@pytest.mark.parametrize("name", ["transitions", "flows", "combinations", "capacity", "stragglers", "replication"])
def test_analysis_draws_real_decisions(law: Run, name: str) -> None:
    result = analyze(law, name)
    assert result.figure().data
    assert result.df()["value"].notna().any()
