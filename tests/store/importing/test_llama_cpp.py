"""Expert traces of llama.cpp: four layouts of CSV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.store.importing.import_trace import import_trace
from moescope.store.store import Store

E, K, LAYERS, PROMPT, ANSWER = 8, 3, 3, 5, 4


def _decisions(*, last_layer_once: bool) -> Iterator[tuple[str, int, int, list[int], list[float]]]:
    """(phase, position, layer, experts, weights); of the prompt, the last layer may route the last token only."""
    random = np.random.default_rng(0)
    for position in range(PROMPT + ANSWER):
        for layer in range(LAYERS):
            experts = random.permutation(E)[:K].tolist()
            weights = np.sort(random.random(K))[::-1].round(4).tolist()
            prompt = position < PROMPT
            if prompt and last_layer_once and layer == LAYERS - 1 and position < PROMPT - 1:
                continue
            yield "prefill" if prompt else "decode", position, layer, experts, weights


def _stored(run: Any) -> list[tuple[Any, ...]]:
    query = """
        SELECT t.phase, t.position, r.layer, r.experts, r.weights
        FROM routing r JOIN tokens t USING (run_id, token) WHERE run_id = $run ORDER BY 2, 3
    """
    return run.sql(query).fetchall()


def _route_trace(decisions: list[Any], *, weights: bool = True) -> str:
    lines = [
        "# route_trace v1",
        f"# model=/models/a b.gguf arch=qwen3moe n_layer={LAYERS} n_expert={E} n_expert_used={K}",
        "# layer=0 expert_bytes=1 dense_bytes=2",
        "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped",
    ]
    for phase, position, layer, experts, given in decisions:
        for slot, (expert, weight) in enumerate(zip(experts, given, strict=True)):
            value = weight if weights else "nan"
            lines.append(f"0,{int(phase == 'decode')},{position},{layer},{slot},{expert},{value},1,0,0")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("weights", [True, False])
def test_route_traces_say_all_but_the_text(store: Store, tmp_path: Path, weights: bool) -> None:
    decisions = list(_decisions(last_layer_once=False))
    (tmp_path / "trace.csv").write_text(_route_trace(decisions, weights=weights))
    run = import_trace(store, tmp_path / "trace.csv", name="a")
    assert run.status == "complete", run.coverage.df()
    assert run.model == "/models/a b.gguf"
    assert run.sql("SELECT DISTINCT n_experts, top_k FROM layers WHERE run_id = $run").fetchall() == [(E, K)]
    expected = [
        (phase, position, layer, experts, [np.float32(w) for w in given] if weights else None)
        for phase, position, layer, experts, given in decisions
    ]
    assert _stored(run) == expected


def test_the_last_layer_of_a_prompt_is_short_as_llama_cpp_computes_it(store: Store, tmp_path: Path, gaps: Any) -> None:
    decisions = list(_decisions(last_layer_once=True))
    (tmp_path / "trace.csv").write_text(_route_trace(decisions))
    run = import_trace(store, tmp_path / "trace.csv", name="a")
    assert run.status == "incomplete"
    assert all(site.startswith(f"blocks.{LAYERS - 1}.") for site in gaps(run))
    assert any("last layer" in note for note in run.info["summary"]["notes"])


def test_ranked_rows_are_put_together(store: Store, tmp_path: Path) -> None:
    decisions = list(_decisions(last_layer_once=False))
    lines = ["phase,token,layer,rank,expert"]
    for phase, position, layer, experts, _ in decisions:
        lines += [f"{phase},{position},{layer},{rank},{expert}" for rank, expert in enumerate(experts)]
    (tmp_path / "trace.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    run = import_trace(store, tmp_path / "trace.csv", name="a", n_experts=E)
    assert run.status == "complete"
    assert _stored(run) == [(*decision[:4], None) for decision in decisions]


@pytest.mark.parametrize("last_layer_once", [False, True])
def test_lines_without_a_header_have_negative_prompt_positions(
    store: Store, tmp_path: Path, last_layer_once: bool
) -> None:
    decisions = list(_decisions(last_layer_once=last_layer_once))
    lines = []
    prompt = [d for d in decisions if d[0] == "prefill"]
    for layer in range(LAYERS):  # a prompt is written layer by layer
        lines += [f"{d[1] - PROMPT},{layer},{','.join(map(str, d[3]))}" for d in prompt if d[2] == layer]
    lines += [f"{d[1] - PROMPT},{d[2]},{','.join(map(str, d[3]))}" for d in decisions if d[0] == "decode"]
    (tmp_path / "trace.csv").write_text("\n".join(lines))
    run = import_trace(store, tmp_path / "trace.csv", name="a", n_experts=E)
    assert run.status == ("incomplete" if last_layer_once else "complete")
    assert _stored(run) == [(*decision[:4], None) for decision in decisions]


def test_parts_of_a_long_prompt_follow_each_other(store: Store, tmp_path: Path) -> None:
    """A prompt in two parts: the positions of the second start again."""
    random = np.random.default_rng(1)
    ids = [[random.permutation(E)[:K].tolist() for _ in range(5)] for _ in range(2)]
    lines = []
    for part, (first, length) in enumerate(((0, 3), (3, 2))):
        for layer in range(2):
            for n in range(length):
                position = -(first + length - n)
                lines.append(f"{position},{layer},{','.join(map(str, ids[layer][first + n]))}")
        assert part < 2
    (tmp_path / "trace.csv").write_text("\n".join(lines))
    run = import_trace(store, tmp_path / "trace.csv", name="a", n_experts=E)
    assert [(p, layer, e) for _, p, layer, e, _ in _stored(run)] == [
        (p, layer, ids[layer][p]) for p in range(5) for layer in range(2)
    ]


@pytest.mark.parametrize("header", ["layer,expert\n", ""])
def test_rows_of_no_known_token_are_counted(store: Store, tmp_path: Path, header: str) -> None:
    decisions = list(_decisions(last_layer_once=False))
    rows = [(layer, expert) for *_, layer, experts, _ in decisions for expert in experts]
    (tmp_path / "trace.csv").write_text(header + "".join(f"{layer},{expert}\n" for layer, expert in rows))
    run = import_trace(store, tmp_path / "trace.csv", name="a", n_experts=E, top_k=K)
    assert run.status == "complete"
    found = run.sql("SELECT layer, expert, tokens FROM loads WHERE run_id = $run").fetchall()
    assert sorted(found) == [(layer, e, rows.count((layer, e))) for layer in range(LAYERS) for e in range(E)]
    assert run.rows("routing") == 0


@pytest.mark.parametrize(
    "content",
    [
        "",
        "a,b,c\n1,2,3\n",
        "5\n",
        "layer,expert\n1,x\n",
        "turn,phase,step,layer,slot,expert\n0,0,0,0,0,1\n",
        "-1,0,1,2\n-1,0,1\n",
    ],
)
def test_files_of_no_known_layout_are_refused(store: Store, tmp_path: Path, content: str) -> None:
    (tmp_path / "trace.csv").write_text(content)
    with pytest.raises(InputError):
        import_trace(store, tmp_path / "trace.csv", name="a", n_experts=E)
    assert store.runs() == []
