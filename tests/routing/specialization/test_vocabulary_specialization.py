"""Vocabulary specialization: a lookup router scores 1, values equal counts by hand, rare ids are told from knowledge."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run
from moescope.store.store import Store

Plant = Callable[..., Run]
FIRST, ANY = "share of the most frequent first expert", "share of the most frequent expert of the k"
OF_EXPERT = ", ids of this expert"


def _layers(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["expert"].isna()].set_index(["layer", "ids", "metric"])


def _lookup(ids: np.ndarray, size: int, k: int) -> np.ndarray:
    return np.stack([(ids * 3 + slot) % size for slot in range(k)], 1)


def test_lookup_by_input_id_scores_1_for_the_input_and_less_for_others(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(0)
    ids, predicted = generator.integers(0, 6, 300), generator.integers(0, 6, 300)
    run = plant(
        lengths=[30] * 10,
        ids=ids.tolist(),
        predicted=predicted.tolist(),
        routers=[planted.Router(_lookup(ids, 12, 2), 12)],
    )
    frame = _layers(analyze(run, "vocabulary_specialization").df())
    for metric in (FIRST, ANY):
        row = frame.loc[(0, "input id", metric)]
        assert (row["value"], row["ci_low"], row["ci_high"]) == (1.0, 1.0, 1.0)
        assert row["null"] < 0.4
        assert row["n"] == 6
        for other in ("predicted id", "next id"):
            row = frame.loc[(0, other, metric)]
            assert row["value"] == pytest.approx(row["null"], abs=0.08)


def test_lookup_by_next_id_scores_1_for_the_next(plant: Plant, planted: ModuleType) -> None:
    ids = np.random.default_rng(1).integers(0, 5, 200)
    experts = _lookup(np.append(ids[1:], 0), 5, 1)
    run = plant(lengths=[100, 100], ids=ids.tolist(), routers=[planted.Router(experts, 5)])
    frame = _layers(analyze(run, "vocabulary_specialization", ids="next").df())
    row = frame.loc[(0, "next id", FIRST)]
    assert row["value"] == 1.0
    assert row["occurrences"] == 198  # the last token of a sequence is followed by none


def test_rare_ids_score_1_and_so_does_their_null(plant: Plant, planted: ModuleType) -> None:
    """Every id occurs once: the OLMoE form gives 1 whatever the router does; its null says so, the other form refuses."""
    experts = np.random.default_rng(2).integers(0, 8, (40, 1))
    run = plant(lengths=[40], ids=list(range(40)), routers=[planted.Router(experts, 8)])
    row = _layers(analyze(run, "vocabulary_specialization", ids="input").df()).loc[(0, "input id", FIRST)]
    assert (row["value"], row["null"]) == (1.0, 1.0)
    assert np.isnan(row["ci_low"])  # one document
    with pytest.raises(InputError, match=r"no id occurs 20 times.*min_count"):
        analyze(run, "vocabulary_specialization", ids="input", form="lrc")


@given(data=st.data())
def test_both_forms_equal_counts_by_hand(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    total = sum(lengths)
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    ids, predicted = generator.integers(0, 5, total).tolist(), generator.integers(0, 3, total).tolist()
    shapes = data.draw(st.sampled_from([((3, 1),), ((4, 2), (6, 3)), ((256, 8),), ((2, 2),)]))
    routers = [
        planted.Router(np.stack([generator.permutation(e)[:k] for _ in range(total)]), e, layer=layer)
        for layer, (e, k) in enumerate(shapes)
    ]
    run = plant(lengths=lengths, ids=ids, predicted=predicted, routers=routers)
    least = data.draw(st.integers(1, 3))
    sequence = [s for s, length in enumerate(lengths) for _ in range(length)]
    following = [ids[t + 1] if t + 1 < total and sequence[t + 1] == sequence[t] else None for t in range(total)]
    kinds = {"input id": ids, "predicted id": predicted, "next id": following}
    if not any(count >= least for keys in kinds.values() for key, count in Counter(keys).items() if key is not None):
        return
    frame = analyze(run, "vocabulary_specialization", form="lrc", min_count=least, shuffles=1, draws=5).df()
    olmoe = analyze(run, "vocabulary_specialization", form="olmoe", min_count=least, shuffles=1, draws=5).df()
    assert olmoe["expert"].isna().all()
    for router in routers:
        for kind, keys in kinds.items():
            for metric, slots in ((FIRST, 1), (ANY, router.top_k)):
                counts: dict[int, Counter[int]] = defaultdict(Counter)
                seen: Counter[int] = Counter()
                for key, chosen in zip(keys, router.experts.tolist(), strict=True):
                    if key is not None:
                        seen[key] += 1
                        counts[key].update(chosen[:slots])
                of_expert: dict[int, list[float]] = defaultdict(list)
                for key, times in seen.items():
                    if times >= least:
                        expert, most = min(counts[key].items(), key=lambda item: (-item[1], item[0]))
                        of_expert[expert].append(most / times)
                shares = [share for found in of_expert.values() for share in found]
                for given_frame in (frame, olmoe):
                    mine = given_frame[
                        (given_frame["layer"] == router.layer)
                        & (given_frame["ids"] == kind)
                        & given_frame["metric"].isin([metric])
                    ]
                    assert len(mine) == (1 if shares else 0)
                    if shares:
                        assert mine["value"].item() == pytest.approx(np.mean(shares))
                        assert mine["n"].item() == len(shares)
                parts = frame[
                    (frame["layer"] == router.layer) & (frame["ids"] == kind) & (frame["metric"] == metric + OF_EXPERT)
                ]
                found = dict(zip(parts["expert"].astype(int), parts["value"], strict=True))
                assert found == pytest.approx({expert: np.mean(values) for expert, values in of_expert.items()})


def test_null_without_knowledge_equals_the_value(plant: Plant, planted: ModuleType) -> None:
    """Loads are uneven and ids are rare, so the plain value is far over any load; the shuffles carry all of it."""
    generator = np.random.default_rng(3)
    weight = np.array([0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
    experts = generator.choice(6, size=(2000, 1), p=weight)
    ids = generator.zipf(1.5, 2000) % 300
    run = plant(lengths=[50] * 40, ids=ids.tolist(), routers=[planted.Router(experts, 6)])
    row = _layers(analyze(run, "vocabulary_specialization", ids="input").df()).loc[(0, "input id", FIRST)]
    assert row["value"] > 0.6
    assert row["ci_low"] < row["value"] < row["ci_high"]
    assert row["value"] == pytest.approx(row["null"], abs=0.05)


def test_interval_is_that_of_a_bootstrap_with_the_winners_held(plant: Plant, planted: ModuleType) -> None:
    """Frequent ids in many documents: the linear form and a full recount of resampled documents agree."""
    generator = np.random.default_rng(4)
    documents, length = 60, 40
    ids = generator.integers(0, 3, documents * length)
    taste = generator.beta(2, 2, size=(documents, 3))  # documents differ in how often an id takes expert 0
    document = np.repeat(np.arange(documents), length)
    experts = np.where(generator.random(len(ids)) < taste[document, ids] * 0.5 + 0.45, 0, 1 + ids)[:, None]
    run = plant(lengths=[length] * documents, ids=ids.tolist(), routers=[planted.Router(experts, 4)])
    result = analyze(run, "vocabulary_specialization", ids="input", draws=2000).df()
    row = _layers(result).loc[(0, "input id", FIRST)]
    values = []
    hit = experts[:, 0] == 0
    for _ in range(600):
        weight = np.bincount(generator.integers(0, documents, documents), minlength=documents)[document]
        values.append(np.mean([weight[(ids == i) & hit].sum() / weight[ids == i].sum() for i in range(3)]))
    low, high = np.quantile(values, [0.025, 0.975])
    assert row["ci_low"] == pytest.approx(low, abs=0.15 * (high - low))
    assert row["ci_high"] == pytest.approx(high, abs=0.15 * (high - low))


def test_imported_trace_without_ids_is_refused_with_what_to_add(tmp_path: object) -> None:
    table = pa.table({"sequence_id": [0, 0], "position": [0, 1], "layer": [0, 0], "experts": [[0], [1]]})
    with Store(f"{tmp_path}/runs.duckdb") as store:
        run = store.import_trace(table, name="bare", n_experts=2)
        for name in ("vocabulary_specialization", "context_independence"):
            with pytest.raises(InputError, match=r"no token ids.*column token_id"):
                analyze(run, name)
        with pytest.raises(InputError, match="no token id of any token"):
            analyze(run, "routing_information", given="token id")
        with pytest.raises(InputError, match="no token classes"):
            analyze(run, "class_specialization")
        assert set(analyze(run, "routing_information").df()["given"]) == {"position"}


def test_imported_ids_without_predictions_leave_those_out_and_say_so(tmp_path: object) -> None:
    table = pa.table(
        {
            "sequence_id": [0] * 3,
            "position": [0, 1, 2],
            "layer": [0] * 3,
            "experts": [[0], [1], [0]],
            "token_id": [4, 4, 7],
        }
    )
    with Store(f"{tmp_path}/runs.duckdb") as store:
        run = store.import_trace(table, name="ids", n_experts=2)
        result = analyze(run, "vocabulary_specialization")
        assert set(result.df()["ids"]) == {"input id", "next id"}
        assert "The run has no predicted id." in result.notes
        with pytest.raises(InputError, match="no predicted id"):
            analyze(run, "vocabulary_specialization", ids="predicted")
