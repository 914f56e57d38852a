"""The analysis `expert_cache`: values of the real trace, planted runs, intervals, controls and refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run
from moescope.store.store import Store

Plant = Callable[..., Run]
REAL = Path("/work/shared/data/deepseek_v2_lite_routing")


@pytest.fixture(scope="module")
def law(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    if not (REAL / "law.parquet").exists():
        pytest.skip("the DeepSeek-V2-Lite trace is not here")
    with Store(tmp_path_factory.mktemp("law") / "runs.duckdb") as store:
        yield store.import_trace(REAL / "law.parquet", name="law", n_experts=64)


def curve(run: Run, policy: str, **parameters: Any) -> pd.DataFrame:
    return analyze(run, "expert_cache", policy=policy, draws=2, **parameters).df()


@pytest.mark.parametrize(
    ("policy", "parameters", "expected"),
    [
        ("lru", {}, [0.2494, 0.3798, 0.5966]),
        ("lru", {"preload": False}, [0.2454, 0.3719, 0.5807]),
        ("look_ahead", {"horizon": 4}, [0.3987, 0.5310, 0.6828]),
        ("look_ahead", {"horizon": 16}, [0.3361, 0.5397, 0.7703]),
        ("look_ahead", {"horizon": 64}, [0.2785, 0.4570, 0.7011]),
        ("belady", {}, [0.4103, 0.5990, 0.7934]),
    ],
)
def test_real_trace_gives_the_published_hit_rates(
    law: Run, policy: str, parameters: dict[str, Any], expected: list[float]
) -> None:
    frame = curve(law, policy, **parameters)
    frame = frame[frame["layer"].isin([1, 13, 26])]
    for size, rate in zip((6, 12, 24), expected, strict=True):
        assert frame[frame["size"] == size]["value"].mean() == pytest.approx(rate, abs=5.01e-5)


def test_real_trace_repeats_itself_beyond_its_load(law: Run) -> None:
    result = analyze(law, "expert_cache", policy="lru")
    whole = result.df()
    row = whole[whole["layer"].isna() & (whole["size"] == 12)].iloc[0]
    assert row["ci_low"] > row["null"] > row["uniform"] == pytest.approx(12 / 64)
    assert "A cache of 12 of 64 experts a layer serves 43% of the choices by LRU" in result.title


def _run(plant: Plant, planted: ModuleType, routers: list[Any], lengths: list[int], **fields: Any) -> Run:
    return plant(lengths=lengths, routers=routers, **fields)


def _uneven(planted: ModuleType, tokens: int, seed: int = 0) -> list[Any]:
    """Two layers that differ in experts and k, one of them in attention."""
    generator = np.random.default_rng(seed)
    first = np.argsort(generator.random((tokens, 6)), axis=1)[:, :1]
    second = np.argsort(generator.random((tokens, 9)), axis=1)[:, :3]
    return [planted.Router(first, 6, layer=0, block="attn"), planted.Router(second, 9, layer=2)]


LENGTHS = [9, 1, 14, 6]


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "lifo", "look_ahead", "belady"])
@pytest.mark.parametrize("preload", [True, False])
def test_layers_of_different_size_are_each_replayed(
    plant: Plant, planted: ModuleType, brute: ModuleType, policy: str, preload: bool
) -> None:
    routers = _uneven(planted, sum(LENGTHS))
    frame = curve(_run(plant, planted, routers, LENGTHS), policy, preload=preload, horizon=4)
    cuts = np.cumsum(LENGTHS)[:-1]
    total, moved = np.zeros(9), np.zeros(9)
    for router in routers:
        part = frame[frame["layer"] == router.layer]
        assert set(part["block"]) == {router.block}
        assert part["size"].tolist() == list(range(1, router.n_experts + 1))
        expected, loads = [], []
        for size in part["size"]:
            counted = [
                brute.hits(sequence.tolist(), policy, size, experts=router.n_experts, horizon=4)
                for sequence in np.split(router.experts, cuts)
            ]
            expected.append(sum(hit + free * preload for hit, free in counted) / router.experts.size)
            loads.append(router.top_k - sum(hit for hit, _ in counted) / len(router.experts))
        assert part["value"].tolist() == pytest.approx(expected)
        assert part["transfers"].tolist() == pytest.approx(loads)
        assert part["realisable"].tolist() == [size >= 2 * router.top_k for size in part["size"]]
        moved += np.pad(loads, (0, 9 - router.n_experts), mode="edge")
        total += np.pad(expected, (0, 9 - router.n_experts), mode="edge") * router.experts.size
    whole = frame[frame["layer"].isna()]
    assert whole["value"].tolist() == pytest.approx(total / (4 * sum(LENGTHS)))
    assert whole["transfers"].tolist() == pytest.approx(moved)
    assert set(whole["n"]) == {4 * sum(LENGTHS)}


def test_mean_over_sequences_weighs_a_short_one_like_a_long_one(plant: Plant, planted: ModuleType) -> None:
    """Ten times the same expert hits nine times of ten; one token alone never does."""
    chosen = np.array([[3]] * 10 + [[0]])
    run = _run(plant, planted, [planted.Router(chosen, 4)], [10, 1])
    by_choice, by_sequence = (curve(run, "lru", preload=False, average=a) for a in ("choice", "sequence"))
    assert by_choice[by_choice["size"] == 1]["value"].tolist() == pytest.approx([9 / 11, 9 / 11])
    assert by_sequence[by_sequence["size"] == 1]["value"].tolist() == pytest.approx([0.45, 0.45])


@pytest.mark.parametrize("together", ["token", "layer"])
def test_pool_replays_all_layers_as_one(plant: Plant, planted: ModuleType, brute: ModuleType, together: str) -> None:
    routers = _uneven(planted, sum(LENGTHS), seed=5)
    run = _run(plant, planted, routers, LENGTHS)
    joined = np.concatenate([routers[0].experts, routers[1].experts + 6], axis=1)
    for policy in ("lru", "fifo", "belady"):
        frame = curve(run, policy, pool="model", together=together, preload=False)
        assert frame["layer"].isna().all()
        for size, value in zip(frame["size"], frame["value"], strict=True):
            step = [0, 1, 4] if together == "layer" else None
            hits = [
                brute.hits(part.tolist(), policy, size, experts=15, step=step)[0]
                for part in np.split(joined, np.cumsum(LENGTHS)[:-1])
            ]
            assert value == pytest.approx(sum(hits) / joined.size)


def test_null_experts_take_no_place(plant: Plant, planted: ModuleType) -> None:
    """Expert 2 computes nothing; 0 and 1 alternate."""
    chosen = np.array([[2, t % 2] if t % 3 else [t % 2, 2] for t in range(12)])
    run = _run(
        plant, planted, [planted.Router(chosen, 2, n_null=1), planted.Router(chosen, 2, layer=1, n_null=1)], [12]
    )
    for pool, sizes in (("layer", [1, 2]), ("model", [2, 4])):
        frame = curve(run, "lru", preload=False, pool=pool)
        whole = frame[frame["layer"].isna()].set_index("size")["value"]
        assert [whole[size] for size in sizes] == pytest.approx([0, 10 / 12])
        assert set(frame[frame["layer"].isna()]["n"]) == {24}


def test_bytes_are_transfers_times_the_size_of_an_expert(plant: Plant, planted: ModuleType) -> None:
    run = _run(plant, planted, _uneven(planted, sum(LENGTHS)), LENGTHS)
    assert "bytes" not in curve(run, "lru").columns
    frame = curve(run, "lru", expert_bytes=1000)
    assert frame["bytes"].tolist() == pytest.approx((frame["transfers"] * 1000).tolist())
    run.store.connection.execute(
        'UPDATE runs SET anatomy = \'{"d_model": 10}\', settings = \'{"dtype": "bfloat16"}\' WHERE run_id = ?',
        [run.run_id],
    )
    frame = curve(run, "lru")
    assert frame["bytes"].tolist() == pytest.approx((frame["transfers"] * 3 * 10 * 8 * 2).tolist())


def test_order_is_found_where_planted_and_not_in_independent_tokens(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(0)
    lengths = [100] * 12
    independent = np.argsort(generator.random((1200, 16)), axis=1)[:, :2]
    sticky = np.repeat(independent[::20], 20, axis=0)
    routers = [planted.Router(independent, 16, layer=0), planted.Router(sticky, 16, layer=1)]
    frame = curve(_run(plant, planted, routers, lengths), "lru")
    at_four = frame[frame["size"] == 4].set_index("layer")
    assert abs(at_four["value"][0] - at_four["null"][0]) < 0.02
    assert at_four["value"][1] > at_four["null"][1] + 0.5


def test_interval_covers_the_mean_and_is_absent_for_one_document(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(2)
    chosen = np.argsort(generator.random((200, 8)), axis=1)[:, :2]
    many = analyze(_run(plant, planted, [planted.Router(chosen, 8)], [20] * 10), "expert_cache", policy="lru").df()
    inside = many[many["size"] < 8]
    assert ((inside["ci_low"] <= inside["value"]) & (inside["value"] <= inside["ci_high"])).all()
    assert (inside["ci_low"] < inside["ci_high"]).all()
    parts = {"lengths": [20] * 10, "documents": [0] * 10, "routers": [planted.Router(chosen, 8)]}
    assert analyze(plant(**parts), "expert_cache", policy="lru").df()["ci_low"].isna().all()


def test_thousands_of_documents_share_rows_without_changing_the_mean(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(4)
    chosen = generator.integers(0, 4, (4600, 1))
    run = _run(plant, planted, [planted.Router(chosen, 4)], [2] * 2300)
    frame = curve(run, "lru", preload=False)
    repeated = (chosen[1::2] == chosen[::2]).sum()
    assert frame[frame["size"] == 2]["value"].tolist() == pytest.approx([repeated / 4600] * 2)


def test_single_expert_layer_is_always_served(plant: Plant, planted: ModuleType) -> None:
    run = _run(plant, planted, [planted.Router(np.zeros((3, 1), int), 1)], [1, 2])
    frame = analyze(run, "expert_cache").df()
    assert set(frame["size"]) == {1}
    assert (frame["value"] == 1).all()
    assert frame["transfers"].tolist() == pytest.approx([2 / 3] * len(frame))


def test_run_without_decisions_is_refused(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[4], streams={0: planted.Stream(np.ones(4), median=np.ones(1))})
    with pytest.raises(InputError, match="record with the probe"):
        analyze(run, "expert_cache")
    run = _run(plant, planted, _uneven(planted, 4), [4])
    with pytest.raises(InputError, match="horizon"):
        analyze(run, "expert_cache", horizon=0)
