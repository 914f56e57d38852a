"""Ways of all tokens through a few layers: brute force, sums, and what a click on the figure gives away."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]
TOKENS = 90


@pytest.fixture(scope="module")
def chosen() -> list[np.ndarray]:
    generator = np.random.default_rng(5)
    return [(generator.zipf(1.6, TOKENS) % 9)[:, None] for _ in range(4)]


@pytest.fixture(scope="module")
def run(plant: Plant, planted: ModuleType, chosen: list[np.ndarray]) -> Run:
    routers = [planted.Router(experts, 9, layer=layer) for layer, experts in enumerate(chosen)]
    return plant(lengths=[30] * 3, routers=routers, labels=["a", "b", "a"])


def test_flows_are_counts_of_tokens(run: Run, chosen: list[np.ndarray]) -> None:
    frame = analyze(run, "path_map", experts=3).df()
    named = [[e for e, _ in sorted(Counter(c[:, 0].tolist()).items(), key=lambda p: (-p[1], p[0]))[:3]] for c in chosen]
    for step, (here, there) in enumerate(itertools.pairwise(range(4))):
        counted: Counter[tuple[int | None, int | None]] = Counter()
        for i, j in zip(chosen[here][:, 0].tolist(), chosen[there][:, 0].tolist(), strict=True):
            counted[i if i in named[here] else None, j if j in named[there] else None] += 1
        part = frame[frame["layer"] == step]
        found = {
            (
                None if np.isnan(row.expert) else int(row.expert),
                None if np.isnan(row.to_expert) else int(row.to_expert),
            ): row
            for row in part.astype({"expert": float, "to_expert": float}).itertuples()
        }
        assert {pair: row.n for pair, row in found.items()} == dict(counted)
        assert part["value"].sum() == pytest.approx(1)
        leaving, coming = Counter[int | None](), Counter[int | None]()
        for (i, j), n in counted.items():
            leaving[i] += n
            coming[j] += n
        for (i, j), row in found.items():
            assert row.null == pytest.approx(leaving[i] * coming[j] / TOKENS**2)
            assert row.lift == pytest.approx(row.value / row.null)


def test_one_label_is_followed_alone(run: Run, chosen: list[np.ndarray]) -> None:
    frame = analyze(run, "path_map", layers=2, experts=9, label="b").df()
    assert frame["n"].sum() == 30
    pairs = set(zip(chosen[0][30:60, 0].tolist(), chosen[1][30:60, 0].tolist(), strict=True))
    assert set(zip(frame["expert"].tolist(), frame["to_expert"].tolist(), strict=True)) == pairs


def test_the_figure_keeps_every_token_and_names_ways_for_clicks(run: Run) -> None:
    result = analyze(run, "path_map", experts=2)
    diagram = result.figure().data[0]
    values, sources, targets = (np.array(diagram.link[name]) for name in ("value", "source", "target"))
    inner = set(sources) & set(targets)
    for node in inner:
        assert values[sources == node].sum() == pytest.approx(values[targets == node].sum()), "what comes in goes out"
    frame = result.df()
    both = frame[frame["expert"].notna() & frame["to_expert"].notna()]
    ways = {f"{r.layer}:{r.expert}-{r.to_layer}:{r.to_expert}" for r in both.itertuples()}
    assert set(diagram.link.customdata) - {""} == ways
    assert "others" in diagram.node.label


@pytest.mark.parametrize(
    ("asked", "words"),
    [({"layers": 7}, "at most 6"), ({"first_layer": 3}, "two routers"), ({"label": "c"}, "label 'c'")],
)
def test_what_cannot_be_drawn_is_refused(run: Run, asked: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        analyze(run, "path_map", **asked)
