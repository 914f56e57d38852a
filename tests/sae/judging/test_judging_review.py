"""Which tokens and vectors count when an autoencoder is judged and read, and which autoencoders stand side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.analysis_api import analyze
from moescope.core.sites import Site
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.judging.judge import judge
from moescope.sae.judging.run_tokens import batches_of, run_tokens
from moescope.sae.judging.vectors import live_vectors, recorded_vectors
from moescope.sae.loading import from_disk
from moescope.sae.reading.read import read_features
from moescope.store.sae_rows import write_rows
from moescope.store.vectors import vector_shards

READ, WRITTEN, SLOTS = "blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out", "blocks.0.mlp.experts.hook_out"
WIDTH, LENGTHS = 32, [24, 17, 30] * 8
EXPERT = 3


@pytest.fixture
def module(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("qwen3_moe")


@pytest.fixture
def run(module: Any, token_ids: Callable[..., Any], record_ids: Callable[..., Any]) -> Any:
    """24 texts with the vectors of one sublayer."""
    labels = ["a", "b"] * (len(LENGTHS) // 2)
    sites = [READ, WRITTEN, SLOTS]
    return record_ids(module, token_ids(LENGTHS), probes=("tokens", "activations"), sites=sites, labels=labels)


@pytest.fixture
def poor(store: Any, tmp_path: Path) -> Autoencoder:
    """The four largest components of either sign of a vector."""
    from sae_lens import TopKSAE, TopKSAEConfig

    module = TopKSAE(TopKSAEConfig(d_in=WIDTH, d_sae=2 * WIDTH, k=4))
    rows = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    with torch.no_grad():
        module.W_enc.copy_(rows.T)
        module.W_dec.copy_(rows)
        module.b_enc.zero_()
        module.b_dec.zero_()
    module.save_model(tmp_path / "poor")
    return from_disk(tmp_path / "poor", site=WRITTEN, store=store, name="poor")


def kept(run: Any, site: str) -> list[tuple[int, int | None, Any]]:
    """Token, expert and vector of every row that a run kept at a site."""
    found = []
    for shard in vector_shards(run, site):
        experts = [None] * len(shard.token) if shard.expert is None else [int(e) for e in shard.expert]
        found += list(zip([int(t) for t in shard.token], experts, shard.float32(), strict=True))
    return found


def again(x: Any) -> Any:
    """What is left of a vector by its four largest components."""
    return np.where(np.abs(x) >= np.sort(np.abs(x))[-4], x, 0)


def left(pairs: list[tuple[Any, Any]]) -> float:
    """FVU of pairs of what is encoded and what it stands for, in plain loops."""
    mean = np.mean([y for _, y in pairs], axis=0)
    above = sum(float(((y - again(x)) ** 2).sum()) for x, y in pairs)
    return above / sum(float(((y - mean) ** 2).sum()) for _, y in pairs)


def positions(run: Any) -> dict[int, int]:
    return dict(run.sql("SELECT token, position FROM tokens WHERE run_id = $run").fetchall())


@pytest.mark.parametrize("how", ["is_special = true", "class = 'special'"])
def test_tokens_that_stand_for_no_text_count_neither_judged_nor_read(
    run: Any, poor: Autoencoder, store: Any, how: str
) -> None:
    store.connection.execute(f"UPDATE tokens SET {how} WHERE run_id = ? AND token % 5 = 2", [run.run_id])
    counting = {token for token, position in positions(run).items() if position >= 1 and token % 5 != 2}
    vectors = [x.astype(np.float64) for token, _, x in kept(run, WRITTEN) if token in counting]
    judged = judge(poor, None, store, run=run, controls=1, held_out=False, progress=False)
    (fvu,) = [row for row in judged.rows if (row.metric, row.condition) == ("fvu", "sae")]
    assert fvu.n == len(vectors) == len(counting)
    assert fvu.value == pytest.approx(left([(x, x) for x in vectors]), rel=1e-5)
    read = read_features(poor, run, store, documents="all", skip_first=1, progress=False)
    assert read.tokens == len(counting)
    active = np.zeros(2 * WIDTH, int)
    for x in vectors:
        largest = again(x)
        active += np.concatenate([largest > 0, largest < 0])
    assert store.fetch("SELECT feature, active FROM features WHERE active > 0 ORDER BY feature") == [
        (latent, count) for latent, count in enumerate(active.tolist()) if count
    ]


def test_a_transcoder_to_one_expert_is_judged_on_that_expert_s_rows(
    run: Any, poor: Autoencoder, store: Any, module: Any
) -> None:
    across = dataclasses.replace(poor, site=Site.parse(READ), target_site=Site.parse(SLOTS), expert=EXPERT)
    place = positions(run)
    given = {token: x.astype(np.float64) for token, _, x in kept(run, READ)}
    pairs = {
        token: (given[token], y.astype(np.float64))
        for token, expert, y in kept(run, SLOTS)
        if expert == EXPERT and place[token] >= 1
    }
    assert 20 < len(pairs) < sum(position >= 1 for position in place.values())
    judged = judge(across, None, store, run=run, controls=1, held_out=False, progress=False)
    (fvu,) = [row for row in judged.rows if (row.metric, row.condition) == ("fvu", "sae")]
    assert fvu.n == len(pairs)
    assert fvu.value == pytest.approx(left(list(pairs.values())), rel=1e-4)
    tokens = run_tokens(run)
    eligible = tokens.position >= 1
    recorded = recorded_vectors(run, across, tokens, eligible, limit=10_000, seed=0)
    batches = list(batches_of(run, tokens, np.unique(tokens.sequence)))
    for found in (recorded, live_vectors(ms.load(module), across, batches, tokens, eligible)):
        order = np.argsort(tokens.token[found.place])
        assert tokens.token[found.place][order].tolist() == sorted(pairs)
        for side, vectors in enumerate((found.x, found.y)):
            wanted = np.array([pairs[token][side] for token in sorted(pairs)], np.float32)
            np.testing.assert_allclose(vectors.numpy()[order], wanted, atol=1e-5)


def test_a_plain_site_is_not_compared_with_transcoders_from_there(run: Any, store: Any) -> None:
    def row(number: int, **where: Any) -> dict[str, Any]:
        id_ = f"00000000-0000-0000-0000-{number:012d}"
        return {"sae_id": id_, "architecture": "topk", "d_in": WIDTH, "d_sae": 64, **where}

    saes = [
        row(1, name="plain", site=READ),
        row(2, name="across", site=READ, target_site=WRITTEN),
        row(3, name="to one expert", site=READ, target_site=SLOTS, expert=EXPERT),
        row(4, name="elsewhere", site=WRITTEN),
    ]
    measures = [
        {"sae_id": one["sae_id"], "run_id": run.run_id, "metric": metric, "condition": condition, "group_kind": "all",
         "value": value, "n": 100, "unit": unit}
        for one in saes
        for metric, condition, value, unit in [
            ("fvu", "sae", 0.3, "share of variance"), ("fvu", "pca", 0.6, "share of variance"), ("l0", "sae", 8.0, "latents"),
        ]
    ]  # fmt: skip
    write_rows(store, {"saes": saes, "sae_measures": measures})
    for site, name in [(READ, "plain"), (WRITTEN, "elsewhere"), (f"{READ} → {WRITTEN}", "across")]:
        found = analyze(run, "sae_comparison", site=site)
        assert (found.n, set(found.df()["sae"])) == (1, {name})
