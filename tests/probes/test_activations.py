"""Recorded vectors are those that passed their site, of exactly the tokens that the hash picks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.core.sites import Site
from moescope.probes.families.tiny import build_tiny
from moescope.probes.probe import ProbeContext
from moescope.probes.recorders.activations import ActivationsProbe
from moescope.probes.taps import sites_of, tapped
from moescope.store.vector_sampling import token_hash
from moescope.store.vectors import vector_shards

LENGTHS = (7, 12, 3, 9, 5)
SEQUENCES = [[(7 * row + 3 * place) % 90 + 2 for place in range(length)] for row, length in enumerate(LENGTHS)]
SEED, SHARE = 11, 0.4
BACKENDS = ("grouped_mm", "batched_mm", "eager")
NO_VECTORS = ("hook_pattern", "hook_expert_indices", "hook_expert_weights")


def picked(share: float = SHARE) -> list[tuple[int, int, int]]:
    """(token, sequence, position) of every token that the hash picks."""
    places = [(s, p) for s, length in enumerate(LENGTHS) for p in range(length)]
    return [
        (token, s, p) for token, (s, p) in enumerate(places) if int(token_hash(SEED, s, p)) < share * 2**64
    ]  # fmt: skip


def stored(run: Any, site: Site | str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, set[str]]:
    """Vectors in float32, tokens, experts and types of all shards."""
    shards = list(vector_shards(run, str(site), verify=True))
    experts = None if shards[0].expert is None else np.concatenate([shard.expert for shard in shards])  # type: ignore[misc]
    return (
        np.concatenate([shard.float32() for shard in shards]),
        np.concatenate([shard.token for shard in shards]),
        experts,
        {shard.dtype for shard in shards},
    )


def passing(module: Any, sites: list[Site], batch_size: int) -> dict[tuple[Site, int], dict[str, torch.Tensor]]:
    """(site, sequence) → tensors of a batch at a site, and which row of them the sequence is."""
    seen: dict[tuple[Site, int], dict[str, torch.Tensor]] = {}
    for start in range(0, len(SEQUENCES), batch_size):
        rows = SEQUENCES[start : start + batch_size]
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])

        def receive(site: Site, tensors: dict[str, torch.Tensor], start: int = start, rows: Any = rows) -> None:
            for row in range(len(rows)):
                seen[site, start + row] = {**{n: t.clone() for n, t in tensors.items()}, "row": torch.tensor(row)}

        with torch.no_grad(), tapped(module, ms.load(module).anatomy, sites, receive):
            module(input_ids=ids, attention_mask=mask, use_cache=False)
    return seen


def vectors_by_hand(site: Site, tensors: dict[str, Any], position: int, width: int) -> list[tuple[Any, int | None]]:
    """Vectors of one token with their experts, by a loop."""
    row = int(tensors["row"])
    flat = row * width + position
    if site.tensor == "experts.hook_out":
        return list(zip(tensors["out"][flat], tensors["indices"][flat].tolist(), strict=True))
    if site.tensor == "experts.hook_post":
        k = tensors["indices"].shape[1]
        found = dict(zip(tensors["slot"].tolist(), tensors["post"], strict=True))
        return [(found[flat * k + n], expert) for n, expert in enumerate(tensors["indices"][flat].tolist())]
    name = next(n for n in ("resid", "out", "logits", "given", "post", "q", "k", "v", "z") if n in tensors)
    whole = tensors[name]
    return [(whole[row, position] if whole.dim() > 2 else whole[flat], None)]


@pytest.mark.parametrize(
    ("model_type", "dtype", "backend"),
    [("deepseek_v3", "float32", backend) for backend in BACKENDS]
    + [("olmoe", "bfloat16", backend) for backend in BACKENDS]
    + [("gpt_oss", "float32", "grouped_mm"), ("qwen2_moe", "bfloat16", "grouped_mm"), ("mixtral", "float32", "eager")],
)
def test_vectors_of_every_site_are_those_that_passed_it(
    model_type: str, dtype: str, backend: str, record_ids: Callable[..., Any]
) -> None:
    module: Any = build_tiny(model_type, dtype=getattr(torch, dtype))
    module.set_experts_implementation(backend)
    model = ms.load(module)
    sites = [s for s in sites_of(module, model.anatomy) if s.tensor not in NO_VECTORS]
    assert {"hook_resid_post", "experts.hook_out", "experts.hook_post", "hook_router_logits"} <= {
        s.tensor for s in sites
    }
    run = record_ids(module, SEQUENCES, batch_size=2, sites=sites, sample=SHARE, seed=SEED)
    assert run.status == "complete"
    seen = passing(module, sites, 2)
    kept = picked()
    assert 0 < len(kept) < sum(LENGTHS)
    for site in sites:
        found, tokens, experts, dtypes = stored(run, site)
        expected: list[tuple[int, int | None, Any]] = []
        for token, sequence, position in kept:
            first = sequence - sequence % 2
            width = max(LENGTHS[first : first + 2])
            for vector, expert in vectors_by_hand(site, seen[site, sequence], position, width):
                expected.append((token, expert, vector))
        assert tokens.tolist() == [token for token, _, _ in expected], site
        assert (None if experts is None else experts.tolist()) == (
            None if expected[0][1] is None else [expert for _, expert, _ in expected]
        )
        assert len(dtypes) == 1
        for vector, (_, _, by_hand) in zip(found, expected, strict=True):
            assert dtypes == {str(by_hand.dtype).removeprefix("torch.")}
            assert np.array_equal(vector, by_hand.float().numpy()), site


def test_the_sample_does_not_depend_on_batches_or_padding(record_ids: Callable[..., Any]) -> None:
    module = build_tiny("olmoe")
    sites = ["blocks.0.hook_resid_post", "blocks.1.mlp.experts.hook_out", "blocks.1.mlp.experts.hook_post"]
    runs = [
        record_ids(module, SEQUENCES, name=f"{size} {side}", batch_size=size, padding=side, sites=sites, sample=SHARE, seed=SEED)
        for size in (1, 3, 5)
        for side in ("left", "right")
    ]  # fmt: skip
    for site in sites:
        (first, tokens, experts, _), *others = (stored(run, site) for run in runs)
        assert sorted(set(tokens.tolist())) == [token for token, _, _ in picked()]
        for vectors, its_tokens, its_experts, _ in others:
            assert np.array_equal(its_tokens, tokens)
            assert (its_experts is None and experts is None) or np.array_equal(its_experts, experts)
            np.testing.assert_allclose(vectors, first, rtol=1e-3, atol=1e-4)


def test_every_token_is_kept_unless_a_share_is_asked_for(record_ids: Callable[..., Any]) -> None:
    run = record_ids(build_tiny("olmoe"), SEQUENCES, batch_size=2, sites=["blocks.1.hook_resid_post"])
    _, tokens, _, _ = stored(run, "blocks.1.hook_resid_post")
    assert tokens.tolist() == list(range(sum(LENGTHS)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_generated_tokens_are_sampled_at_their_own_positions(backend: str, record_ids: Callable[..., Any]) -> None:
    """Those of sequences that have ended are not; the vectors are those of the same text read at once."""
    module: Any = build_tiny("olmoe")
    module.set_experts_implementation(backend)
    sites = ["blocks.1.hook_resid_post", "blocks.1.mlp.experts.hook_post"]
    options = {"batch_size": 3, "sites": sites, "sample": SHARE, "seed": SEED}
    query = "SELECT token_id FROM tokens WHERE run_id = ? AND sequence_id = 1 AND position = ?"
    long = record_ids(module, SEQUENCES, name="long answers", generate=6, **options)
    ((module.generation_config.eos_token_id,),) = long.store.fetch(query, [long.run_id, LENGTHS[1] + 1])
    run = record_ids(module, SEQUENCES, name="answers", generate=6, **options)
    assert run.status == "complete"
    assert run.rows("tokens") < long.rows("tokens"), "no answer has ended early"
    rows = run.store.fetch(
        "SELECT token, sequence_id, position, token_id FROM tokens WHERE run_id = ? ORDER BY token", [run.run_id]
    )
    expected = [token for token, s, p, _ in rows if int(token_hash(SEED, s, p)) < SHARE * 2**64]
    whole = [[ids for _, s, _, ids in rows if s == sequence] for sequence in range(len(SEQUENCES))]
    assert any(p >= LENGTHS[s] for t, s, p, _ in rows if t in expected), "no generated token is sampled"
    again = record_ids(module, whole, name="at once", **options)
    for site in sites:
        (answers, tokens, *_), (read, read_tokens, *_) = stored(run, site), stored(again, site)
        order = np.argsort(tokens, kind="stable")
        assert sorted(set(tokens.tolist())) == expected
        assert np.array_equal(tokens[order], read_tokens)
        np.testing.assert_allclose(answers[order], read, rtol=1e-3, atol=1e-4)


def test_null_experts_have_no_neurons_to_keep(record_ids: Callable[..., Any]) -> None:
    """LongCat's identity experts put something out, and have no neurons: nothing is made up for them."""
    module = build_tiny("longcat_flash")
    s = ms.load(module).anatomy.moe[0]
    sites = [f"blocks.{s.layer}.{s.block}.experts.{tensor}" for tensor in ("hook_out", "hook_post")]
    run = record_ids(module, SEQUENCES, batch_size=2, sites=sites)
    assert run.status == "complete"
    (_, out_tokens, out_experts, _), (_, post_tokens, post_experts, _) = (stored(run, site) for site in sites)
    assert out_experts is not None
    assert post_experts is not None
    real = out_experts < (s.n_experts or 0)
    assert 0 < int(real.sum()) < len(real)
    assert np.array_equal(post_experts, out_experts[real])
    assert np.array_equal(post_tokens, out_tokens[real])


def test_the_ledger_counts_sampled_tokens(record_ids: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module, site = build_tiny("olmoe"), "blocks.1.hook_resid_post"

    def ledger(run: Any) -> dict[str, tuple[int, int, str]]:
        return {r["site"]: (r["expected"], r["recorded"], r["status"]) for r in run.coverage.table.to_pylist()}

    options = {"batch_size": 2, "sites": [site], "sample": SHARE, "seed": SEED}
    good = ledger(record_ids(module, SEQUENCES, name="good", **options))
    assert good[f"{site} vectors"] == (len(picked()), len(picked()), "complete")
    plain, calls = ActivationsProbe.tap, []

    def missing(self: Any, at: Site, tensors: Any) -> Any:
        found = plain(self, at, tensors)
        calls.append(bool(found))
        return {} if sum(calls) == 1 else found

    monkeypatch.setattr(ActivationsProbe, "tap", missing)
    run = record_ids(module, SEQUENCES, name="short", **options)
    lost = sum(sequence < 2 for _, sequence, _ in picked())
    assert lost
    assert ledger(run)[f"{site} vectors"] == (len(picked()), len(picked()) - lost, "short")
    assert run.status == "incomplete"


@pytest.mark.parametrize("tensor", NO_VECTORS)
def test_sites_that_have_no_vectors_are_refused(tensor: str, record_ids: Callable[..., Any], store: Any) -> None:
    block = "attn" if tensor == "hook_pattern" else "mlp"
    with pytest.raises(ms.InputError, match="no vectors are kept"):
        record_ids(build_tiny("olmoe"), SEQUENCES, sites=[f"blocks.0.{block}.{tensor}"])
    assert store.runs() == []


def test_taps_read_nothing_back(without_values: Callable[[], Any]) -> None:
    """The places come from the host before the pass; where tensors have no values, a host read has none to give."""
    from moescope.probes.batches import Batch, Sequence

    names = ("hook_resid_post", "experts.hook_out", "experts.hook_post", "hook_router_logits")
    sites = tuple(Site(0, "" if name == "hook_resid_post" else "mlp", name) for name in names)
    document: Any = None
    rows = tuple(Sequence(n, n, document, 0, "", np.arange(length)) for n, length in enumerate(LENGTHS))
    probe = ActivationsProbe(ProbeContext(ms.load(build_tiny("olmoe")).anatomy, sites=sites, share=SHARE, seed=SEED))
    probe.enter(Batch(0, rows, 0), step=0, side="right")
    with without_values():
        mask = torch.ones(len(LENGTHS), max(LENGTHS), dtype=torch.bool)
        flat, k = mask.numel(), 2
        decision = {
            "indices": torch.zeros(flat, k, dtype=torch.int64),
            "weights": torch.zeros(flat, k),
            "slot": torch.zeros(flat * k, dtype=torch.int64),
        }
        given = {
            sites[0]: {"resid": torch.zeros(*mask.shape, 8, dtype=torch.bfloat16)},
            sites[1]: {"out": torch.zeros(flat, k, 8, dtype=torch.bfloat16), **decision},
            sites[2]: {"post": torch.zeros(flat * k, 6, dtype=torch.bfloat16), **decision},
            sites[3]: {"logits": torch.zeros(flat, 4)},
        }
        kept = {site: probe.tap(site, {**tensors, "mask": mask}) for site, tensors in given.items()}
    n = len(picked())
    assert [tuple(kept[site]["vectors"].shape) for site in sites] == [(n, 8), (n, k, 8), (n, k, 6), (n, 4)]


@pytest.fixture(params=["fake", "meta"])
def without_values(request: pytest.FixtureRequest) -> Callable[[], Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return (
        (lambda: FakeTensorMode(allow_non_fake_inputs=True))
        if request.param == "fake"
        else (lambda: torch.device("meta"))
    )
