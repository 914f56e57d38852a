"""A large store to measure the dashboard with: two runs of one corpus, each with so many decisions, and all that pages read.

    .venv/bin/python benchmarks/dashboard_store.py PATH [--decisions 25e6] [--layers 48]

A decision is one row of `routing`: what one router chose for one token, k experts of 64. Rows are those of `synthetic_run.py`,
written through `RunWriter` as a recording's are. Beside routing there are residual norms and channels of every token and layer,
loads by ten labels, reductions by expert, massive activations, super experts, heads and the features of one autoencoder, all of
them random numbers of the usual size. The second run, `edited`, has the same tokens and other decisions from the middle layer on.
"""

from __future__ import annotations

import argparse
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from synthetic_run import SyntheticRun, _add, _lists, _Place

from moescope.store.run import Run
from moescope.store.sae_rows import write_rows
from moescope.store.store import Store
from moescope.store.writer import BatchRecords

_HEADS = 16
_FEATURES = 4096
_EXAMPLES = 20
_WINDOW = 32
_CHANNELS = 1024
_MASSIVE = 400.0


@dataclass(frozen=True)
class DashboardRun(SyntheticRun):
    """A synthetic run with residual streams; `turned` gives it other decisions in its upper half."""

    turned: float = 0.0

    def batches(self) -> Iterator[BatchRecords]:
        """The batches, each with rows of `residual` and `massive_activations` too."""
        for records in super().batches():
            token = records.tables["tokens"]["token"].to_numpy()
            first = records.tables["tokens"]["position"].to_numpy() == 0
            rng = np.random.default_rng([self.seed, 2, records.number])
            for layer in range(self.layers):
                _residual(records, layer, token, first, rng)
            yield records

    def _layer_rows(
        self, records: BatchRecords, layer: int, place: _Place, state: NDArray[np.float32], rng: np.random.Generator
    ) -> None:
        turned = state * np.float32(1 + self.turned) if layer >= self.layers // 2 else state
        super()._layer_rows(records, layer, place, turned, rng)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("path", type=Path)
    options.add_argument("--decisions", type=float, default=25e6)
    options.add_argument("--layers", type=int, default=48)
    given = options.parse_args()
    made(given.path, int(given.decisions), given.layers)


def made(path: Path, decisions: int, layers: int = 48) -> Path:
    """The store, made where it is not there yet."""
    if path.exists():
        return path
    begun = time.perf_counter()
    half = path.with_suffix(".making")
    half.unlink(missing_ok=True)
    with Store(half) as store:
        for name, turned in (("edited", 0.15), ("base", 0.0)):
            plan = DashboardRun(tokens=-(-decisions // layers), layers=layers, top_k=4, turned=turned)
            run = plan.write(store, name)
            _whole_run(store, run, plan)
            sys.stderr.write(f"{name}: {plan.tokens * plan.layers:,} decisions, {time.perf_counter() - begun:.0f} s\n")
        store.connection.execute("UPDATE runs SET corpus_fingerprint = repeat('c', 64), architecture = 'SyntheticMoe'")
        _autoencoder(store, store.run("base"), np.random.default_rng(3), layers)
    half.rename(path)
    return path


def _residual(
    records: BatchRecords, layer: int, token: NDArray[np.int64], first: NDArray[np.bool_], rng: np.random.Generator
) -> None:
    rows = len(token)
    norm = rng.gamma(40.0, (1 + layer) / 40.0, rows).astype(np.float32)
    top = -np.sort(-rng.gamma(3.0, 0.4, (rows, 3)).astype(np.float32), axis=1)
    massive = first & (layer > 2)
    top[massive, 0] = _MASSIVE
    norm[massive] = _MASSIVE
    channels = rng.integers(0, _CHANNELS, (rows, 3)).astype(np.uint16)
    channels[massive, 0] = 77
    three = pa.list_(pa.float32(), 3), pa.list_(pa.uint16(), 3)
    where = {"token": token, "layer": np.full(rows, layer, np.uint16)}
    values = {"top_values": _lists(top).cast(three[0]), "top_channels": _lists(channels).cast(three[1])}
    _add(records, "residual", {**where, "norm": norm, **values})
    if massive.any():
        kept = token[massive]
        found = {"channel": np.full(len(kept), 77, np.int32), "value": np.full(len(kept), _MASSIVE)}
        level = np.full(len(kept), layer, np.uint16)
        _add(records, "massive_activations", {"layer": level, "token": kept, **found, "ratio": found["value"] / 0.4})


def _whole_run(store: Store, run: Run, plan: DashboardRun) -> None:
    """Rows that a recording writes at its end."""
    rng = np.random.default_rng(4)
    heads = [
        (run.run_id, layer, head, metric, "base", float(rng.beta(1, 6)), plan.tokens, "attn")
        for layer in range(plan.layers)
        for head in range(_HEADS)
        for metric in ("sink", "entropy", "previous_token", "induction", "retrieval")
    ]
    columns = ("run_id", "layer", "head", "metric", "condition", "value", "n", "block")
    layers = [
        {"run_id": run.run_id, "layer": layer, "block": "attn", "stack": "decoder", "kind": "attention"}
        for layer in range(plan.layers)
    ]
    rows = {
        "heads": [dict(zip(columns, row, strict=True)) for row in heads],
        "layers": layers,
        "super_experts": [
            {"run_id": run.run_id, "rule": "published", "layer": 2, "block": "mlp", "expert": e, "value": v, "threshold": 120.0}
            for e, v in ((5, 410.0), (9, 150.0))
        ],
    }  # fmt: skip
    write_rows(store, rows)
    store.connection.execute(
        """
        INSERT INTO residual_sequences
        SELECT run_id, sequence_id, layer::USMALLINT, 0.3 + 0.1 * random()
        FROM sequences, range(?) AS l(layer)
        WHERE run_id = ?
        """,
        [plan.layers, run.run_id],
    )


def _autoencoder(store: Store, run: Run, rng: np.random.Generator, layers: int) -> None:
    """One autoencoder with features, examples, labels and experts, as reading it would leave them."""
    owner = {"sae_id": str(uuid.UUID(int=1)), "run_id": run.run_id}
    sequences, length = store.fetch("SELECT count(*), min(n_tokens) FROM sequences WHERE run_id = ?", [run.run_id])[0]
    write_rows(
        store,
        {
            "saes": [
                {
                    "sae_id": owner["sae_id"], "name": "large", "site": f"blocks.{layers // 2}.hook_resid_post", "d_in": _CHANNELS,
                    "architecture": "topk", "trained_as": "topk", "d_sae": _FEATURES, "path": "large.saes", "checksum": "0" * 64,
                    "model": "synthetic", "trained_on": run.run_id, "vectors": 500_000, "settings": "{}", "summary": "{}",
                    "versions": "{}",
                }
            ],
            "features": _owned(_features(rng), owner),
            "feature_contexts": _owned(_contexts(rng, sequences, length), owner),
            "feature_labels": _owned(_labels(rng), owner),
            "feature_experts": _owned(_experts(rng, layers // 2), owner),
        },
    )  # fmt: skip


def _features(rng: np.random.Generator) -> dict[str, Any]:
    n = _FEATURES
    active = (500_000 * rng.beta(0.5, 30, n)).astype(np.int64)
    return {
        "feature": np.arange(n, dtype=np.int32), "active": active, "tokens": np.full(n, 500_000),
        "documents": np.minimum(active, 900), "mean": rng.gamma(2.0, 1.0, n), "maximum": rng.gamma(9.0, 1.0, n),
        "edges": _lists(np.tile(np.linspace(0, 9, 41, dtype=np.float32), (n, 1))),
        "counts": _lists(rng.integers(0, 1000, (n, 40)).astype(np.uint64)), "decoder_norm": np.ones(n),
        "raised_ids": _lists(rng.integers(0, 20_000, (n, 15)).astype(np.int32)),
        "raised": _lists(-np.sort(-rng.random((n, 15), np.float32), axis=1)),
        "lowered_ids": _lists(rng.integers(0, 20_000, (n, 15)).astype(np.int32)),
        "lowered": _lists(np.sort(-rng.random((n, 15), np.float32), axis=1)),
    }  # fmt: skip


def _contexts(rng: np.random.Generator, sequences: int, length: int) -> dict[str, Any]:
    n = _FEATURES * _EXAMPLES
    first = rng.integers(0, max(length - _WINDOW, 1), n).astype(np.int32)
    activations = np.where(rng.random((n, _WINDOW)) < 0.1, rng.gamma(2.0, 1.0, (n, _WINDOW)), 0).astype(np.float32)
    peak = rng.gamma(9.0, 1.0, n)
    activations[:, 21] = peak
    return {
        "feature": np.repeat(np.arange(_FEATURES, dtype=np.int32), _EXAMPLES), "stratum": np.zeros(n, np.int32),
        "rank": np.tile(np.arange(_EXAMPLES, dtype=np.int32), _FEATURES), "sequence_id": rng.integers(0, sequences, n),
        "position": first + 21, "value": peak, "first_position": first, "activations": _lists(activations),
    }  # fmt: skip


def _labels(rng: np.random.Generator) -> dict[str, Any]:
    n = _FEATURES * 10
    lift = rng.gamma(4.0, 0.25, n)
    return {
        "feature": np.repeat(np.arange(_FEATURES, dtype=np.int32), 10), "label": [f"domain{i}" for i in range(10)] * _FEATURES,
        "active": rng.integers(0, 2000, n), "tokens": np.full(n, 50_000), "lift": lift, "ci_low": lift * 0.9,
        "ci_high": lift * 1.1, "p": rng.random(n), "q": rng.random(n),
    }  # fmt: skip


def _experts(rng: np.random.Generator, layer: int) -> dict[str, Any]:
    n = _FEATURES * 64
    value = rng.normal(size=n)
    return {
        "feature": np.repeat(np.arange(_FEATURES, dtype=np.int32), 64), "layer": np.full(n, layer, np.uint16),
        "block": ["mlp"] * n, "expert": np.tile(np.arange(64, dtype=np.int32), _FEATURES), "metric": ["correlation"] * n,
        "value": value, "ci_low": value - 0.1, "ci_high": value + 0.1, "n": np.full(n, 500_000), "unit": ["correlation"] * n,
    }  # fmt: skip


def _owned(columns: dict[str, Any], owner: dict[str, str]) -> pa.Table:
    rows = len(columns["feature"])
    return pa.table({**{name: [value] * rows for name, value in owner.items()}, **columns})


if __name__ == "__main__":
    main()
