"""The chain over planted records: its nodes, the newest effect of each link, its controls, and honest gaps."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.phenomena.chain_records import ChainEffects, short
from moescope.store.effects import EffectRow, Measured, new_effect_id, write_effects
from moescope.store.phenomena_rows import HeadRows, SuperExpertRow, write_heads, write_super_experts
from moescope.store.run import Run

Plant = Callable[..., Run]
LENGTH, LAYERS = 6, 4


@pytest.fixture
def with_massive(plant: Plant, planted: ModuleType) -> Callable[[], Run]:
    """Two texts; 30,000 in channel 7 at first tokens after blocks 1 and 2, 5 elsewhere; median 0.5."""

    def make() -> Run:
        streams = {}
        for layer in range(LAYERS):
            values = np.full((2 * LENGTH, 3), 5.0)
            if layer in (1, 2):
                values[[0, LENGTH], 0] = 30_000.0
            streams[layer] = planted.Stream(
                np.abs(values).max(1),
                values=values,
                channels=np.tile([7, 8, 9], (2 * LENGTH, 1)),
                median=np.full(2, 0.5),
            )
        return plant(lengths=[LENGTH, LENGTH], streams=streams, name=f"massive-{uuid.uuid4()}")

    return make


def effect(run: Run, name: str, values: dict[str, float], controls: list[dict[str, float]]) -> str:
    """Write an effect: metric → value over everything, for the target and each control."""
    effect_id = new_effect_id()

    def rows(found: dict[str, float]) -> list[EffectRow]:
        return [EffectRow("all", None, metric, v, v - 0.1, v + 0.1, 50, "nats") for metric, v in found.items()]

    text = f'{{"name": "{name}", "edits": []}}'
    measured = [Measured(effect_id, run.run_id, text, "target", None, rows(values))]
    other = '{"name": "other", "edits": []}'
    measured += [Measured(effect_id, run.run_id, other, "control", d, rows(v)) for d, v in enumerate(controls)]
    write_effects(run.store, measured)
    return effect_id


def row(run: Run, node: str, metric: str) -> Any:
    frame = analyze(run, "phenomena_chain").df()
    found = frame[(frame["node"] == node) & (frame["metric"] == metric)]
    assert len(found) == 1
    return found.iloc[0]


def test_every_node_and_arrow_is_what_was_written(with_massive: Any) -> None:
    run = with_massive()
    write_super_experts(run, ["paper", "released"], [SuperExpertRow("paper", 1, "mlp", 3, 700.0, 70.0)])
    write_heads(
        run,
        [
            HeadRows(2, "attn", "induction", np.array([0.05, 0.6]), 8),
            HeadRows(3, "attn", "induction", np.array([0.2, np.nan]), 8),
            HeadRows(2, "attn", "sink_alpha_0", np.array([0.5, 0.1]), 8),
        ],
    )
    effect(
        run, "chain, writer: L1·E3",
        {"massive_share": 0.02, "sink_share": 0.25, "base_sink": 0.6, "delta_nll": 1.5, "induction_share": 0.4},
        [{"massive_share": 1.0, "sink_share": 0.98, "delta_nll": d} for d in (0.1, 0.3)],
    )  # fmt: skip
    effect(run, "chain, massive to zero: channels 7 after block 1", {"sink_share": 0.3, "delta_nll": 2.0}, [])
    massive = row(run, "massive activation", "largest |x|")
    assert (massive["value"], massive["layer"], massive["channel"], massive["position"]) == (30_000.0, 1, 7, 0)
    assert massive["what"] == "on first tokens"
    assert row(run, "writer", "largest |output|")["what"] == "L1·E3"
    heads = row(run, "heads", "heads over the threshold")
    assert (heads["value"], heads["what"]) == (2, "induction of at least 0.1: L2·H1 0.60, L3·H0 0.20")
    sink = row(run, "sink", "mean attention to the first token")
    assert (sink["value"], sink["what"]) == (0.6, "1 of 2 heads over 0.3")
    left = row(run, "writer", "massive activation that remains")
    assert (left["value"], left["null"], left["cut"]) == (0.02, 1.0, "L1·E3")
    loss = row(run, "writer", "ΔNLL")
    assert loss["value"] == 1.5
    assert (loss["null"], loss["null_low"], loss["null_high"]) == pytest.approx((0.2, 0.1, 0.3))
    assert (loss["ci_low"], loss["ci_high"]) == pytest.approx((1.4, 1.6))
    result = analyze(run, "phenomena_chain")
    assert result.title.startswith("Without L1·E3, 2.0% of the massive activation (|x| up to 30,000 in channel 7,")
    shown = " ".join(a.text or "" for a in result.figure().layout.annotations)
    for text in ("channel 7", "L1·E3", "<b>2.0%</b> remains<br>random cuts: 100.0%", "<b>30.0%</b> remains", "L2·H1"):
        assert text in shown


def test_of_several_chains_the_newest_cut_of_each_link_is_told(with_massive: Any) -> None:
    run = with_massive()
    effect(run, "chain, writer: L1·E3", {"delta_nll": 1.0}, [])
    effect(run, "chain, heads: L2·H1", {"delta_nll": 0.5}, [])
    effect(run, "chain, writer: L2·E9", {"delta_nll": 3.0}, [{"delta_nll": 0.0}])
    effect(run, "another experiment", {"delta_nll": 9.0}, [])
    found = ChainEffects(run)
    assert found.links == ["writer", "heads"]
    assert found.cut("writer") == "L2·E9"
    assert found.share("writer", "delta_nll").value == 3.0
    assert found.share("heads", "delta_nll").value == 0.5
    assert found.share("massive to zero", "delta_nll") is None
    assert found.controls == 0


def test_effects_of_another_run_are_not_this_ones(with_massive: Any) -> None:
    run, other = with_massive(), with_massive()
    effect(other, "chain, writer: L1·E3", {"delta_nll": 1.0}, [])
    assert ChainEffects(run).links == []
    assert "no link of its chain was cut" in analyze(run, "phenomena_chain", uncut=True).title
    with pytest.raises(InputError, match=r"nothing of the chain was measured.*moescope phenomena"):
        analyze(run, "phenomena_chain")


def test_rewriting_heads_and_super_experts_leaves_one_of_each(with_massive: Any) -> None:
    run = with_massive()
    for value in (0.3, 0.7):
        write_heads(run, [HeadRows(0, "attn", "induction", np.array([value]), 4)])
        write_super_experts(run, ["paper"], [SuperExpertRow("paper", 1, "mlp", 3, value, 0.1)])
    write_heads(run, [HeadRows(0, "attn", "echo", np.array([0.1]), 4)])
    heads = "SELECT metric, value FROM heads WHERE run_id = ? ORDER BY metric"
    assert run.store.fetch(heads, [run.run_id]) == [("echo", 0.1), ("induction", 0.7)]
    assert run.store.fetch("SELECT value FROM super_experts WHERE run_id = ?", [run.run_id]) == [(0.7,)]
    write_super_experts(run, ["paper"], [])
    assert run.rows("super_experts") == 0


def test_what_cannot_be_written_is_refused(with_massive: Any) -> None:
    from moescope.core.errors import InputError

    run = with_massive()
    twice = [HeadRows(0, "attn", "induction", np.array([0.1]), 4)] * 2
    with pytest.raises(InputError, match="given twice"):
        write_heads(run, twice)
    with pytest.raises(InputError, match="not among those that were held"):
        write_super_experts(run, ["paper"], [SuperExpertRow("REAP", 1, "mlp", 3, 1.0, 0.1)])
    assert run.rows("heads") == run.rows("super_experts") == 0


def test_long_lists_are_shortened() -> None:
    assert short("a, b") == "a, b"
    assert short("a, b, c, d, e") == "a, b, c and 2 more"
