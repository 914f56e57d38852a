"""Small stores with planted records: no model and no torch behind them, every number known or derivable by SQL."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from moescope.store.run import Run
from moescope.store.store import Store

LAYERS, EXPERTS, TOP_K = 2, 4, 2


@dataclass(frozen=True)
class Text:
    """One sequence: its label, and the bytes of each token."""

    label: str | None
    tokens: list[bytes]
    source: str = "planted"


PLAIN = [
    Text("english", [b"<bos>", b"The", b" cat", b" sat", b".\n", b"It", b" slept", b"."]),
    Text("japanese", [b"<bos>", b"\xe6\x97", b"\xa5", "本".encode(), b" a\xc3", b"\xa9", b"\n"]),
    Text(None, [b"<bos>", b"def", b" f", b"():", b"\n    ", b"pass"]),
]


@dataclass
class Plan:
    """What a planted run is like."""

    name: str = "planted"
    texts: list[Text] = field(default_factory=lambda: list(PLAIN))
    moe: bool = True
    status: str = "complete"
    vocabulary: bool = True
    residual: bool = True
    seed: int = 0


def plant(store: Store, plan: Plan) -> Run:
    """Write a run as recording would have left it."""
    run = store.begin_run(
        name=plan.name,
        model="planted-model",
        revision="r1",
        architecture="PlantedMoe",
        seed=plan.seed,
        corpus_fingerprint="f" * 64,
        settings={"probes": ["tokens", "routing"], "batch_size": 1},
        versions={"moescope": "0.1.0"},
        summary={"tokens": 21, "seconds": 2.0, "tokens_per_second": 10.5},
        anatomy={"d_model": 8, "parameters": 1234},
    )
    generator = np.random.default_rng(plan.seed)
    distinct: dict[bytes, int] = {}
    tokens, sequences = [], []
    for number, text in enumerate(plan.texts):
        sequences.append(
            (
                number,
                number,
                0,
                text.label,
                text.source,
                b"".join(text.tokens).decode("utf-8", "replace"),
                len(text.tokens),
                f"h{number}",
                None,
            )
        )
        for position, raw in enumerate(text.tokens):
            token_id = distinct.setdefault(raw, len(distinct))
            nll = None if position == 0 else float(generator.gamma(2.0))
            tokens.append(
                (
                    len(tokens),
                    number,
                    position,
                    token_id,
                    "prefill",
                    nll,
                    int(generator.integers(0, 3)),
                    raw == b"<bos>",
                    "word",
                )
            )
    frame(
        store,
        run,
        "sequences",
        ["sequence_id", "document_id", "part", "label", "source", "text", "n_tokens", "content_hash", "metadata"],
        sequences,
    )
    frame(
        store,
        run,
        "tokens",
        ["token", "sequence_id", "position", "token_id", "phase", "nll", "predicted_id", "is_special", "class"],
        tokens,
    )
    if plan.vocabulary:
        frame(
            store,
            run,
            "vocabulary",
            ["token_id", "bytes", "text"],
            [(i, raw, raw.decode("utf-8", "replace")) for raw, i in distinct.items()],
        )
    store.add_layers(
        run,
        [
            {
                "layer": layer,
                "block": "mlp",
                "stack": "decoder",
                **(
                    {"kind": "moe", "n_experts": EXPERTS, "top_k": TOP_K, "n_shared": 0, "n_null": 0}
                    if plan.moe
                    else {"kind": "dense"}
                ),
                "d_expert": 16,
            }
            for layer in range(LAYERS)
        ],
    )
    if plan.residual:
        rows = [
            (t[0], layer, float(generator.gamma(5.0)), [1.0, 0.5, -0.2], [1, 2, 3])
            for t in tokens
            for layer in range(LAYERS)
        ]
        frame(store, run, "residual", ["token", "layer", "norm", "top_values", "top_channels"], rows)
    if plan.moe:
        _route(store, run, generator, len(tokens))
    short = plan.status != "complete"
    frame(
        store,
        run,
        "coverage",
        ["site", "expected", "recorded", "status", "detail"],
        [
            ("tokens", len(tokens), len(tokens), "complete", None),
            (
                "blocks.0.mlp.hook_expert_indices",
                2 * len(tokens),
                2 * len(tokens) - 3 * short,
                "short" if short else "complete",
                "3 events are missing" if short else None,
            ),
        ],
    )
    store.connection.execute(
        "UPDATE runs SET status = ?, finished_at = ? WHERE run_id = ?",
        [plan.status, datetime.datetime(2026, 1, 2), run.run_id],
    )
    return store.run(plan.name)


def frame(store: Store, run: Run, table: str, columns: list[str], rows: list[tuple[object, ...]]) -> None:
    """Insert rows of one run into a table."""
    if not rows:
        return
    data = pd.DataFrame(rows, columns=columns, dtype=object)
    store.connection.register("planted_rows", data)
    names = ", ".join(f'"{column}"' for column in columns)
    store.connection.execute(
        f'INSERT INTO "{table}" (run_id, {names}) SELECT ?, {names} FROM planted_rows', [run.run_id]
    )
    store.connection.unregister("planted_rows")


def _route(store: Store, run: Run, generator: np.random.Generator, tokens: int) -> None:
    rows = []
    for token in range(tokens):
        for layer in range(LAYERS):
            experts = generator.choice(EXPERTS, TOP_K, replace=False, p=[0.5, 0.3, 0.15, 0.05]).tolist()
            first = float(np.float32(generator.uniform(0.5, 1.0)))
            rows.append(
                (
                    token,
                    layer,
                    "mlp",
                    experts,
                    [first, 1 - first],
                    float(generator.uniform()),
                    float(generator.uniform(0.5, 1.3)),
                )
            )
    frame(store, run, "routing", ["token", "layer", "block", "experts", "weights", "margin", "entropy"], rows)
    store.connection.execute(
        """
        INSERT INTO loads
        WITH slots AS (
            SELECT r.layer, r.block, s.label, unnest(r.experts) AS expert, unnest(r.weights) AS weight
            FROM routing r
            JOIN tokens t ON t.run_id = r.run_id AND t.token = r.token
            JOIN sequences s ON s.run_id = t.run_id AND s.sequence_id = t.sequence_id
            WHERE r.run_id = $run
        ),
        grid AS (
            SELECT * FROM (SELECT DISTINCT layer, block, label FROM slots), range($experts) AS e(expert)
        )
        SELECT $run, g.layer, g.block, g.label, 'prefill', g.expert, count(weight), coalesce(sum(weight), 0)
        FROM grid g
        LEFT JOIN slots s ON s.layer = g.layer AND s.label IS NOT DISTINCT FROM g.label AND s.expert = g.expert
        GROUP BY ALL
        """,
        {"run": run.run_id, "experts": EXPERTS},
    )
    store.connection.execute(
        """
        INSERT INTO experts
        SELECT $run, layer, block, expert, sum(tokens), sum(weight_sum), 1.5, sum(weight_sum) * 1.5, 2.5, 3, 4, NULL, NULL
        FROM loads
        WHERE run_id = $run
        GROUP BY layer, block, expert
        """,
        {"run": run.run_id},
    )


def planted_store(path: Path, *plans: Plan) -> Store:
    """A new store with these runs, open for writing."""
    store = Store(path)
    for plan in plans:
        plant(store, plan)
    return store
