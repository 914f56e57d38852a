"""What a layer loses when its router takes the experts that a score ranks first, beside random experts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from moescope.core.edit_kinds.experts import SetRouting
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.sites import MLP_IN, Site
from moescope.core.statistics import bootstrap_ratio
from moescope.probes.batches import Batch
from moescope.probes.effects.paired import paired_pass
from moescope.probes.live_model import LiveModel
from moescope.sae.data.live import site_vectors
from moescope.sae.experts.decisions import decisions_tapped
from moescope.sae.experts.run_text import RunText
from moescope.store.run import Run
from moescope.store.store import Store

Router = tuple[int, str]
Score = Callable[[torch.Tensor, Router], torch.Tensor]
CONDITIONS = ("expected_l0", "random")


def swapped_routers(
    model: LiveModel,
    text: RunText,
    routers: Sequence[Router],
    score: Score,
    *,
    batch_size: int,
    draws: int,
    seed: int,
    progress: bool,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the NLL's rise with one router at a time replaced by the k experts of largest score, and by k random ones.

    The decisions are written as a run of a store that is thrown away, and replayed by `SetRouting`, the router's own rule giving
    their weights.

    Args:
        model: what runs.
        text: what it reads.
        routers: (layer, block), one replaced at a time.
        score: of a block's input [token, d_model] and the router: [token, expert], the largest are taken.
        batch_size, draws, seed: of the passes and the resampling.
        progress: unused where there is little to do.

    Returns:
        Rows of `sae_measures` with their router as `at`, and notes on what was left out.
    """
    del progress
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "swapped.duckdb") as store:
        runs = {name: _Swapped(store, name, model) for name in CONDITIONS}
        random = np.random.default_rng(seed)
        for batch in text.batches(batch_size):
            _write(model, batch, routers, score, runs, random)
        variants = [Intervention([_edit(name, at)]) for at in routers for name in CONDITIONS]
        sources = {name: swapped.run for name, swapped in runs.items()}
        documents: list[NDArray[np.int64]] = []
        sums: list[NDArray[np.float64]] = []
        counts: list[NDArray[np.float64]] = []
        try:
            for paired in paired_pass(model, text.batches(batch_size), variants, sources=sources):
                documents.append(np.array([s.document_id for s in paired.batch.sequences]))
                sums.append(paired.delta_nll.sum(2).T)
                counts.append(paired.predicted.sum(1).astype(np.float64))
        except InputError as refused:
            return [], [f"No router was swapped: {refused.problem} ({refused.found})."]
    group = text.groups(np.concatenate(documents), len(text.documents))
    total, count = np.zeros((text.n_documents, len(variants))), np.zeros(text.n_documents)
    np.add.at(total, group, np.concatenate(sums))
    np.add.at(count, group, np.concatenate(counts))
    total, count = total[count > 0], count[count > 0]
    value, low, high = bootstrap_ratio(total, count[:, None], draws=draws, seed=seed)
    rows = []
    for number, (at, name) in enumerate((at, name) for at in routers for name in CONDITIONS):
        bounds = [None if np.isnan(b[number]) else float(b[number]) for b in (low, high)]
        rows.append(
            {
                "at": at,
                "metric": "swap_delta_nll",
                "condition": name,
                "group_kind": "layer",
                "group_value": str(at[0]) if at[1] == "mlp" else f"{at[0]} {at[1]}",
                "value": float(value[number]),
                "ci_low": bounds[0],
                "ci_high": bounds[1],
                "n": int(count.sum()),
                "unit": "nats",
            }
        )
    return rows, []


def _edit(name: str, at: Router) -> SetRouting:
    return SetRouting(layer=at[0], block=at[1], run=name, weights="own")


class _Swapped:
    """A run of decisions that no router took."""

    def __init__(self, store: Store, name: str, model: LiveModel) -> None:
        self.store, self.tokens = store, 0
        self.run: Run = store.begin_run(
            name=name, model=model.name, architecture=model.anatomy.architecture, settings={}, versions={}, seed=0,
            corpus_fingerprint="", anatomy={},
        )  # fmt: skip
        rows = [
            {
                "layer": s.layer,
                "block": s.block,
                "stack": s.stack,
                "kind": s.kind,
                "n_experts": s.n_experts,
                "top_k": s.top_k,
            }
            for s in model.anatomy.moe
        ]
        store.add_layers(self.run, rows)

    def add(self, sequence: Any, position: Any, token_id: Any, decisions: dict[Router, NDArray[np.int64]]) -> None:
        """Write a batch."""
        number = np.arange(self.tokens, self.tokens + len(sequence))
        self._insert(
            "tokens",
            {"token": number, "sequence_id": sequence, "position": position, "token_id": token_id, "phase": ["prefill"] * len(number)},
        )  # fmt: skip
        for (layer, block), ids in decisions.items():
            many, k = ids.shape
            columns = {"token": number, "layer": [layer] * many, "block": [block] * many, "experts": ids.tolist()}
            self._insert("routing", {**columns, "weights": np.full((many, k), 1 / k).tolist()})
        self.tokens += len(number)

    def _insert(self, table: str, columns: dict[str, Any]) -> None:
        connection = self.store.connection
        connection.register("swapped_rows", pa.table(columns))
        connection.execute(
            f'INSERT INTO "{table}" BY NAME SELECT ?::UUID AS run_id, * FROM swapped_rows',  # noqa: S608  a name given here
            [self.run.run_id],
        )
        connection.unregister("swapped_rows")


@torch.no_grad()
def _write(
    model: LiveModel, batch: Batch, routers: Sequence[Router], score: Score, runs: dict[str, _Swapped],
    random: np.random.Generator,
) -> None:  # fmt: skip
    """The decisions of one batch, by the score and at random."""
    with decisions_tapped(model, routers) as tapped:
        found = site_vectors(model, batch, [Site(*at, MLP_IN) for at in routers])
    decisions: dict[str, dict[Router, NDArray[np.int64]]] = {name: {} for name in CONDITIONS}
    for at in routers:
        ranked = score(found[Site(*at, MLP_IN)].vectors.float(), at)
        k = tapped.at(at, found).shape[1]
        decisions["expected_l0"][at] = ranked.topk(k, dim=1).indices.cpu().numpy()
        decisions["random"][at] = random.random(ranked.shape).argsort(1)[:, :k]
    for name, swapped in runs.items():
        swapped.add(found.sequence, found.position, found.token_id, decisions[name])
