"""Runs planted row by row, so that every expected value is known before moescope reads it.

Nothing here comes from moescope's own recording: rows are written out and inserted with plain SQL. Test folders load this
file by its path (`--import-mode=importlib` gives test modules no common package).
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.store.run import Run
from moescope.store.store import Store
from moescope.store.vector_shards import VectorRows, write_shards

# Everything an outsider may have put into a name, a label or a text.
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "'><svg/onload=alert(4)>",
    "<b>bold</b> & <a href='https://evil.example'>here</a>",
    "\u202egnp.exe",
    "line one\nline two\r\x1b[31mred\x07",
    "[red]rich[/red] [/nothing] %{x} {braces} $run ?",
    "Robert'); DROP TABLE runs;--",
    "🧪 ﷽ 日本語",
)


@dataclass
class Router:
    """The decisions of one router.

    Attributes:
        experts: [token, k] ids, in slot order.
        n_experts, n_null: routed and null experts.
        layer, block: where it is.
        weights: [token, k]; 1 ÷ k each where not given.
        entropy: [token], NaN for none recorded.
        margin: [token]; 0.5 where not given.
        logits: [token, n_experts + n_null] for `router_logits`; no rows where not given.
        norms: [token, k] for `expert_outputs`; no rows where not given.
        rule: `layers.routing_rule`.
    """

    experts: NDArray[np.integer[Any]]
    n_experts: int
    layer: int = 0
    block: str = "mlp"
    n_null: int = 0
    weights: NDArray[np.floating[Any]] | None = None
    entropy: NDArray[np.floating[Any]] | None = None
    margin: NDArray[np.floating[Any]] | None = None
    logits: NDArray[np.floating[Any]] | None = None
    norms: NDArray[np.floating[Any]] | None = None
    rule: Mapping[str, Any] | None = None

    @property
    def top_k(self) -> int:
        return int(self.experts.shape[1])

    @property
    def given(self) -> NDArray[np.floating[Any]]:
        return np.full(self.experts.shape, 1 / self.top_k) if self.weights is None else self.weights


@dataclass
class Stream:
    """The residual stream at one block's output.

    Attributes:
        norm: [token]; values: [token, 3] largest by magnitude, signed; channels: [token, 3]; median: [sequence].
    """

    norm: NDArray[np.floating[Any]]
    values: NDArray[np.floating[Any]] | None = None
    channels: NDArray[np.integer[Any]] | None = None
    median: NDArray[np.floating[Any]] | None = None


@dataclass
class Vectors:
    """Vectors kept at a site.

    Attributes:
        values: [row, component], written as float32.
        token: [row]; 0, 1, 2, … where not given.
        expert: [row] id of the expert, for sites inside experts.
    """

    values: NDArray[np.floating[Any]]
    token: NDArray[np.integer[Any]] | None = None
    expert: NDArray[np.integer[Any]] | None = None


@dataclass
class Plan:
    """What to plant.

    Attributes:
        lengths: tokens of each sequence.
        documents, labels: of each sequence; every sequence its own document and no label where not given.
        nll: [token], NaN for none; 1 nat where not given. First tokens of sequences never have one.
        ids: [token] token ids; 0, 1, 2, … modulo 50 where not given.
        predicted: [token] most likely next ids; 0 where not given.
        classes: [token] token classes; "word" where not given.
        decode: [token] whether it was generated; none where not given.
        vocabulary: token id → bytes.
        routers: decisions; streams: layer → residual stream; experts: rows of the table `experts`.
        vectors: site → vectors kept beside the store.
        head_layers: layers with attention heads, with scores of every protocol.
        effects: interventions measured against the run, with controls.
        features: autoencoders, their features, sparse probes, descriptions, students of MLPs and a circuit of heads.
    """

    lengths: Sequence[int]
    documents: Sequence[int] | None = None
    labels: Sequence[str | None] | None = None
    nll: NDArray[np.floating[Any]] | None = None
    ids: Sequence[int] | None = None
    predicted: Sequence[int] | None = None
    classes: Sequence[str] | None = None
    decode: Sequence[bool] | None = None
    vocabulary: Mapping[int, bytes] = field(default_factory=dict)
    routers: Sequence[Router] = ()
    streams: Mapping[int, Stream] = field(default_factory=dict)
    experts: Sequence[Mapping[str, Any]] = ()
    vectors: Mapping[str, Vectors] = field(default_factory=dict)
    head_layers: int = 0
    effects: int = 0
    features: bool = False

    @property
    def tokens(self) -> int:
        return int(sum(self.lengths))

    @property
    def position(self) -> list[int]:
        return [position for length in self.lengths for position in range(length)]

    @property
    def sequence(self) -> list[int]:
        return [number for number, length in enumerate(self.lengths) for _ in range(length)]


def plant(
    store: Store,
    plan: Plan,
    *,
    name: str = "planted",
    status: str = "complete",
    summary: Mapping[str, Any] | None = None,
) -> Run:
    """Write a run as `plan` says and give it its status."""
    run = store.begin_run(
        name=name, model="planted", architecture="PlantedForCausalLM", settings={}, versions={}, seed=0,
        corpus_fingerprint="f" * 64, anatomy={"n_layers": 1 + max([r.layer for r in plan.routers], default=0)},
    )  # fmt: skip
    store.add_layers(run, _layers(plan))
    labels = plan.labels or [None] * len(plan.lengths)
    documents = plan.documents or range(len(plan.lengths))
    insert(run, "sequences", _sequences(plan, list(documents), labels))
    insert(run, "tokens", _tokens(plan))
    insert(run, "vocabulary", [_piece(token_id, raw) for token_id, raw in plan.vocabulary.items()])
    for router in plan.routers:
        insert(run, "routing", _routing(router))
        insert(run, "loads", loads(router, [labels[s] for s in plan.sequence], plan.decode))
        insert(run, "router_logits", _vectors(router, "logits", router.logits))
        insert(run, "expert_outputs", _vectors(router, "norms", router.norms))
    for layer, stream in plan.streams.items():
        insert(run, "residual", _residual(layer, stream))
        if stream.median is not None:
            rows = [
                {"sequence_id": i, "layer": layer, "median_abs": float(value)} for i, value in enumerate(stream.median)
            ]
            insert(run, "residual_sequences", rows)
    insert(run, "experts", plan.experts)
    _keep(run, plan.vectors)
    if plan.head_layers:
        _plant_attention(run, plan)
        beside("planted_head_scores").plant_head_scores(run, sequences=len(plan.lengths), layers=plan.head_layers)
    if plan.effects:
        beside("planted_effects").plant_effects(run, effects=plan.effects)
        experts = min((router.n_experts for router in plan.routers), default=0)
        beside("planted_sweeps").every_sweep(
            run, layers=len(plan.routers), n_experts=experts, sequences=len(plan.lengths)
        )
    if plan.features:
        beside("planted_steering").plant_steering(store, run)
        beside("planted_sae_measures").plant_sae_measures(run)
        beside("planted_concepts").plant_concepts(run)
        beside("planted_students").plant_students(run)
        beside("planted_students").plant_circuit(run)
        beside("planted_feature_experts").plant_feature_experts(
            run,
            layer=max(len(plan.routers) - 1, 0),
            n_experts=min((router.n_experts for router in plan.routers), default=1),
        )
        beside("planted_features").plant_features(run)
    ledger = {"site": "tokens", "expected": plan.tokens, "recorded": plan.tokens, "status": "complete", "detail": None}
    if status == "incomplete":
        ledger |= {"expected": plan.tokens + 7, "status": "short", "detail": "7 events are missing"}
    insert(run, "coverage", [ledger])
    store.connection.execute(
        "UPDATE runs SET status = ?, summary = ? WHERE run_id = ?",
        [status, json.dumps(summary or {"tokens": plan.tokens}), run.run_id],
    )
    return run


def beside(name: str) -> Any:
    """A file of this folder, loaded by its path."""
    spec = importlib.util.spec_from_file_location(f"moescope_tests_{name}", Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _plant_attention(run: Run, plan: Plan) -> None:
    """Attention statistics of three heads a layer: one that spreads evenly, one half on the first token, one wholly."""
    planted = beside("planted_heads")
    heads = [planted.uniform, planted.towards_first(0.5), planted.on_first]
    planted.plant_heads(run, [64] * len(plan.lengths), dict.fromkeys(range(plan.head_layers), heads))


def everything(*, layers: int, n_experts: int, labels: Sequence[str | None], tokens: int = 36) -> dict[str, Any]:
    """Fields of a plan with records of every kind, every expert chosen in turn; one sequence of `tokens` a label."""
    generator = np.random.default_rng(layers * 1000 + n_experts)
    lengths = [tokens] * len(labels)
    total, top_k = sum(lengths), min(2, n_experts)
    routers, experts, streams, vectors = [], [], {}, {}
    for layer in range(layers):
        first = (np.arange(total) * (layer + 1)) % n_experts
        chosen = np.stack([(first + slot) % n_experts for slot in range(top_k)], 1)
        entropy = generator.uniform(0, math.log(max(n_experts, 2)), total)
        logits = generator.normal(size=(total, n_experts))
        np.put_along_axis(logits, chosen, np.sort(generator.uniform(5, 9, chosen.shape), axis=1)[:, ::-1], axis=1)
        norms = generator.uniform(1, 3, chosen.shape)
        routers.append(Router(chosen, n_experts, layer=layer, entropy=entropy, logits=logits, norms=norms))
        slots = {"token": np.repeat(np.arange(total), top_k), "expert": chosen.ravel()}
        vectors[f"blocks.{layer}.mlp.experts.hook_post"] = Vectors(generator.normal(size=(total * top_k, 4)), **slots)
        vectors[f"blocks.{layer}.hook_resid_post"] = Vectors(generator.normal(size=(total, 6)))
        norm = generator.uniform(1, 10, total)
        streams[layer] = Stream(norm, median=np.full(len(lengths), 0.5))
        experts += [
            {
                "layer": layer, "block": "mlp", "expert": expert, "tokens": 4, "weight_sum": 2.0, "output_norm_mean": 1.5,
                "weighted_norm_sum": 3.0, "max_abs_out": float(generator.uniform(1, 5)), "max_abs_channel": 3,
                "max_abs_token": int(generator.integers(total)), "active_share": 0.75, "zero_share": 0.25,
            }
            for expert in range(n_experts)
        ]  # fmt: skip
    return {
        "lengths": lengths, "labels": labels, "nll": generator.exponential(2, total), "routers": routers,
        "streams": streams, "experts": experts, "vectors": vectors,
        "head_layers": layers, "effects": 2, "features": True, "vocabulary": {i: f" t{i}".encode() for i in range(50)},
    }  # fmt: skip


def insert(run: Run, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Insert rows as they stand; a NaN in `nll` or `entropy` is a missing value, elsewhere it is a NaN."""
    listed = [dict(row) for row in rows]
    if not listed:
        return
    cursor = run.store.cursor()
    cursor.register("planted_rows", pa.Table.from_pylist(listed))
    cursor.execute(f'INSERT INTO "{table}" BY NAME SELECT ?::UUID AS run_id, * FROM planted_rows', [run.run_id])
    cursor.unregister("planted_rows")


def loads(router: Router, labels: Sequence[str | None], decode: Sequence[bool] | None = None) -> list[dict[str, Any]]:
    """Rows of `loads`, counted decision by decision."""
    tokens: Counter[tuple[str | None, str, int]] = Counter()
    weight: Counter[tuple[str | None, str, int]] = Counter()
    phases = ["decode" if generated else "prefill" for generated in decode or [False] * len(labels)]
    for label, phase, chosen, weights in zip(
        labels, phases, router.experts.tolist(), router.given.tolist(), strict=True
    ):
        for expert, value in zip(chosen, weights, strict=True):
            tokens[label, phase, expert] += 1
            weight[label, phase, expert] += value
    return [
        {
            "layer": router.layer,
            "block": router.block,
            "label": label,
            "phase": phase,
            "expert": expert,
            "tokens": tokens[label, phase, expert],
            "weight_sum": float(weight[label, phase, expert]),
        }
        for label, phase in dict.fromkeys(zip(labels, phases, strict=True))
        for expert in range(router.n_experts + router.n_null)
    ]


def _layers(plan: Plan) -> list[dict[str, Any]]:
    if not plan.routers:
        return [{"layer": 0, "block": "mlp", "stack": "decoder", "kind": "dense", "d_expert": 8}]
    return [
        {
            "layer": r.layer,
            "block": r.block,
            "stack": "decoder",
            "kind": "moe",
            "n_experts": r.n_experts,
            "top_k": r.top_k,
            "n_shared": 0,
            "n_null": r.n_null,
            "d_expert": 8,
            "routing_rule": None if r.rule is None else json.dumps(r.rule),
        }
        for r in plan.routers
    ]


def _sequences(plan: Plan, documents: list[int], labels: Sequence[str | None]) -> list[dict[str, Any]]:
    seen: Counter[int] = Counter()
    rows = []
    for number, (length, document, label) in enumerate(zip(plan.lengths, documents, labels, strict=True)):
        rows.append(
            {
                "sequence_id": number,
                "document_id": document,
                "part": seen[document],
                "label": label,
                "source": "planted",
                "text": f"text {number}",
                "n_tokens": length,
                "content_hash": f"{number:064x}",
            }
        )
        seen[document] += 1
    return rows


def _tokens(plan: Plan) -> list[dict[str, Any]]:
    nll = np.ones(plan.tokens) if plan.nll is None else plan.nll
    ids = [token % 50 for token in range(plan.tokens)] if plan.ids is None else plan.ids
    predicted = plan.predicted or [0] * plan.tokens
    classes = plan.classes or ["word"] * plan.tokens
    decode = plan.decode or [False] * plan.tokens
    return [
        {
            "token": token,
            "sequence_id": sequence,
            "position": position,
            "token_id": int(ids[token]),
            "phase": "decode" if decode[token] else "prefill",
            "nll": None if position == 0 or np.isnan(nll[token]) else float(nll[token]),
            "predicted_id": int(predicted[token]),
            "is_special": False,
            "class": classes[token],
        }
        for token, (sequence, position) in enumerate(zip(plan.sequence, plan.position, strict=True))
    ]


def _piece(token_id: int, raw: bytes) -> dict[str, Any]:
    return {"token_id": token_id, "bytes": raw, "text": raw.decode("utf-8", "replace")}


def _routing(router: Router) -> list[dict[str, Any]]:
    entropy = np.full(len(router.experts), np.nan) if router.entropy is None else router.entropy
    margin = np.full(len(router.experts), 0.5) if router.margin is None else router.margin
    return [
        {
            "token": token,
            "layer": router.layer,
            "block": router.block,
            "experts": chosen,
            "weights": weights,
            "margin": float(margin[token]),
            "entropy": None if np.isnan(entropy[token]) else float(entropy[token]),
        }
        for token, (chosen, weights) in enumerate(zip(router.experts.tolist(), router.given.tolist(), strict=True))
    ]


def _vectors(router: Router, column: str, values: NDArray[np.floating[Any]] | None) -> list[dict[str, Any]]:
    rows = [] if values is None else values.tolist()
    return [
        {"token": token, "layer": router.layer, "block": router.block, column: row} for token, row in enumerate(rows)
    ]


def _keep(run: Run, vectors: Mapping[str, Vectors]) -> None:
    """Write a shard for each site, and its row of `activations`."""
    rows = []
    for site, kept in vectors.items():
        token = np.arange(len(kept.values)) if kept.token is None else kept.token
        expert = None if kept.expert is None else kept.expert.astype("<i4")
        values = kept.values.astype("<f4")
        rows.append(VectorRows(site, "float32", values, token.astype("<i8"), expert, len(np.unique(token))))
    catalogue = write_shards(run.store.path, run.run_id, rows, {})
    insert(run, "activations", [] if catalogue is None else catalogue.to_pylist())


def _residual(layer: int, stream: Stream) -> list[dict[str, Any]]:
    tokens = len(stream.norm)
    values = np.tile([3.0, -2.0, 1.0], (tokens, 1)) if stream.values is None else stream.values
    channels = np.tile([0, 1, 2], (tokens, 1)) if stream.channels is None else stream.channels
    return [
        {
            "token": token,
            "layer": layer,
            "norm": float(stream.norm[token]),
            "top_values": values[token].tolist(),
            "top_channels": channels[token].tolist(),
        }
        for token in range(tokens)
    ]
