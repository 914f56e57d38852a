"""Probe `attention`: rows by sequence and totals, against eager attention, however a run is cut, padded or merged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moescope as ms
from moescope.probes import attention_slices
from moescope.probes.anatomy import find_anatomy
from moescope.probes.attention_taps import PATTERN_SLICES
from moescope.probes.families.tiny import build_tiny
from moescope.probes.probe import ProbeContext
from moescope.probes.recorders.attention import AttentionProbe
from moescope.store.merging import merge
from moescope.store.store import Store

LENGTHS = (7, 1, 12, 70, 9, 30, 2, 15, 64)
Record = Callable[..., Any]


@pytest.fixture(autouse=True)
def slices_of_a_few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_slices, "SLICE_BYTES_CPU", 4 * 4 * 4 * 70 * 9)


@pytest.fixture
def ids(token_ids: Callable[..., list[list[int]]]) -> list[list[int]]:
    return token_ids(LENGTHS)


def llama(tiny_model: Callable[..., Any], **config: Any) -> Any:
    return tiny_model("llama", max_position_embeddings=128, **config)


def rows(run: Any, table: str = "head_sequences") -> list[tuple[Any, ...]]:
    return run.store.fetch(f'SELECT * EXCLUDE (run_id) FROM "{table}" WHERE run_id = ? ORDER BY ALL', [run.run_id])


def mean(run: Any, metric: str, sequence: int, layer: int) -> np.ndarray:
    """[head] The value of a metric in one sequence."""
    query = """
        SELECT sums, n FROM head_sequences WHERE run_id = ? AND metric = ? AND sequence_id = ? AND layer = ?
    """
    ((sums, n),) = run.store.fetch(query, [run.run_id, metric, sequence, layer])
    return np.array(sums) / n


def eager(model: Any, sequence: list[int]) -> list[np.ndarray]:
    """Layer → [head, query, key], one sequence alone through the model with eager attention."""
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = model(input_ids=torch.tensor([sequence]), output_attentions=True).attentions
    finally:
        model.set_attn_implementation(kernel)
    return [pattern[0].double().numpy() for pattern in found]


def test_rows_are_those_of_eager_attention_of_each_text_alone(
    tiny_model: Callable[..., Any], ids: list[list[int]], record_ids: Record
) -> None:
    model = llama(tiny_model)
    run = record_ids(model, ids, probes=["attention"], batch_size=3)
    assert run.complete
    for number, sequence in enumerate(ids):
        for layer, pattern in enumerate(eager(model, sequence)):
            length = len(sequence)
            first = pattern[:, :, 0]
            for name, expected in {
                "mass_first": first.mean(1),
                "alpha_0": first.mean(1),
                "sink_alpha_0": first[:, :64].mean(1),
                "mass_self": np.stack([np.diagonal(p)[1:] for p in pattern]).sum(1) / length,
                "mass_previous": np.stack([np.diagonal(p, -1) for p in pattern]).sum(1) / length,
            }.items():
                np.testing.assert_allclose(mean(run, name, number, layer), expected, atol=1e-5, err_msg=name)
            if length > 9:
                window = pattern[:, 9 : min(64, length), 9]
                np.testing.assert_allclose(mean(run, "sink_alpha_9", number, layer), window.mean(1), atol=1e-5)


def test_totals_are_the_means_over_all_queries(
    tiny_model: Callable[..., Any], ids: list[list[int]], record_ids: Record
) -> None:
    run = record_ids(llama(tiny_model), ids, probes=["attention"], batch_size=4)
    for metric in ("entropy", "alpha_3"):
        sums, n = np.zeros((2, 4)), np.zeros(2)
        query = "SELECT layer, sums, n FROM head_sequences WHERE metric = ? ORDER BY sequence_id"
        for layer, added, count in run.store.fetch(query, [metric]):
            sums[layer] += added
            n[layer] += count
        query = "SELECT value, n, block, condition FROM heads WHERE metric = ? ORDER BY layer, head"
        found = run.store.fetch(query, [metric])
        np.testing.assert_allclose([row[0] for row in found], (sums / n[:, None]).ravel(), rtol=1e-12)
        assert {row[1:] for row in found} == {(int(n[0]), "attn", "base")}
    assert n[0] == sum(max(0, length - 3) for length in LENGTHS)


def test_classes_of_keys_are_those_of_the_tokens_table(demo_model: Any, store: Store) -> None:
    texts = ["Well, (this) is; it. And more, much more!", "No marks here at all"]
    run = ms.record(demo_model, texts, store, name="run", probes=["attention"], progress=False)
    for number in range(2):
        query = "SELECT token_id, is_special, class FROM tokens WHERE sequence_id = ? ORDER BY position"
        tokens = store.fetch(query, [number])
        marks = np.array([kind == "punctuation" and not special for _, special, kind in tokens])
        marks[0] = False
        assert marks.any() == (number == 0)
        for layer, pattern in enumerate(eager(demo_model.module, [token for token, _, _ in tokens])):
            expected = pattern[:, :, marks].sum((1, 2)) / len(tokens)
            np.testing.assert_allclose(mean(run, "mass_punctuation", number, layer), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_padding_at_either_side_gives_the_same_rows(family: str, ids: list[list[int]], record_ids: Record) -> None:
    found = []
    for side in ("left", "right"):
        run = record_ids(build_tiny(family), ids, name=side, probes=["attention"], batch_size=3, padding=side)
        assert run.complete
        found.append(rows(run))
    for left, right in zip(*found, strict=True):
        assert (*left[:5], left[6]) == (*right[:5], right[6])
        np.testing.assert_allclose(left[5], right[5], atol=1e-5 * max(1, left[6]) * (70 if "distance" in left else 1))


def test_generated_tokens_add_no_queries(
    tiny_model: Callable[..., Any], ids: list[list[int]], record_ids: Record
) -> None:
    plain = record_ids(llama(tiny_model), ids, name="plain", probes=["attention"], batch_size=3, padding="left")
    longer = record_ids(llama(tiny_model), ids, name="longer", probes=["attention"], batch_size=3, generate=3)
    assert longer.complete
    assert longer.info["summary"]["generated_tokens"] > 0
    for before, after in zip(rows(plain), rows(longer), strict=True):
        assert (before[:5], before[6]) == (after[:5], after[6])
        np.testing.assert_allclose(before[5], after[5], rtol=1e-4, atol=1e-4)


def test_layers_without_attention_weights_are_left_out_with_the_reason(
    ids: list[list[int]], record_ids: Record
) -> None:
    run = record_ids(build_tiny("qwen3_next"), ids, probes=["attention"], batch_size=3)
    assert run.complete
    assert {row[1] for row in rows(run)} == {1}
    left_out = run.info["summary"]["attention_left_out"]
    assert set(left_out) == {"blocks.0.attn.hook_pattern", "blocks.2.attn.hook_pattern"}
    assert all("no attention weights" in reason for reason in left_out.values())


def test_compressed_keys_are_left_out_with_the_reason(ids: list[list[int]], record_ids: Record) -> None:
    run = record_ids(build_tiny("deepseek_v4"), ids, probes=["attention"], batch_size=3)
    assert run.complete
    assert {row[1] for row in rows(run)} == {0}
    assert "compressed" in run.info["summary"]["attention_left_out"]["blocks.1.attn.hook_pattern"]


def test_a_model_without_attention_is_refused(ids: list[list[int]], record_ids: Record) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    with pytest.raises(ms.InputError, match="attention"):
        record_ids(model, ids, probes=["attention"])


def test_a_kernel_that_shows_nothing_is_refused_before_the_run(
    tiny_model: Callable[..., Any], ids: list[list[int]], record_ids: Record, store: Store
) -> None:
    model = llama(tiny_model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ms.MoescopeError):
        record_ids(model, ids, probes=["attention"])
    assert store.runs() == []


def test_a_gap_shows_in_the_ledger(
    tiny_model: Callable[..., Any], ids: list[list[int]], record_ids: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = AttentionProbe.rows

    def forgetting(self: Any, host: Any, records: Any) -> None:
        plain(self, host, records)
        if host.batch.number == 1:
            del records.tables["head_sequences"]

    monkeypatch.setattr(AttentionProbe, "rows", forgetting)
    run = record_ids(llama(tiny_model), ids, probes=["attention"], batch_size=3)
    gaps = run.coverage.df().query("status != 'complete'")
    assert run.status == "incomplete"
    assert set(gaps["site"]) == {"blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"}
    assert set(gaps["expected"] - gaps["recorded"]) == {sum(LENGTHS[3:6])}


def test_attention_that_is_no_number_makes_the_run_incomplete(
    tiny_model: Callable[..., Any], ids: list[list[int]], record_ids: Record
) -> None:
    model = llama(tiny_model)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.fill_(torch.inf)
    run = record_ids(model, ids, probes=["attention"], batch_size=3)
    assert run.status == "incomplete"
    assert "NaN" in run.coverage.df().set_index("site").loc["blocks.1.attn.hook_pattern", "detail"]


def test_a_run_that_was_stopped_ends_with_the_same_rows(
    tiny_model: Callable[..., Any], ids: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moescope.store.writer import RunWriter

    monkeypatch.setitem(RunWriter.__init__.__kwdefaults__, "chunk_rows", 1)
    corpus, options = ms.Corpus.from_token_ids(ids), {"probes": ["attention"], "batch_size": 2, "progress": False}
    with Store(tmp_path / "runs.duckdb") as store:
        whole = ms.record(ms.load(llama(tiny_model)), corpus, store, name="whole", generate=2, **options)
        model, calls = llama(tiny_model), []
        plain = model.forward

        @functools.wraps(plain)
        def failing(*args: Any, **named: Any) -> Any:
            calls.append(1)
            if len(calls) > 24:
                raise RuntimeError("stop")
            return plain(*args, **named)

        model.forward = failing
        with pytest.raises(ms.RunError):
            ms.record(ms.load(model), corpus, store, name="cut", generate=2, **options)
        before = store.run("cut")
        assert 0 < before.rows("head_sequences") < whole.rows("head_sequences")
        del model.forward
        ended = ms.record(ms.load(model), corpus, store, name="cut", generate=2, resume=True, **options)
        assert ended.complete
        for table in ("head_sequences", "heads"):
            assert rows(ended, table) == rows(whole, table), table


def test_shards_merge_to_the_same_rows(tiny_model: Callable[..., Any], ids: list[list[int]], tmp_path: Path) -> None:
    corpus, options = ms.Corpus.from_token_ids(ids), {"probes": ["attention"], "batch_size": 2, "progress": False}
    with Store(tmp_path / "whole.duckdb") as store:
        whole = ms.record(ms.load(llama(tiny_model)), corpus, store, name="run", **options)
        expected = {table: rows(whole, table) for table in ("head_sequences", "heads")}
    shards = []
    for part in (range(3), range(2, 5)):  # batch 2 is in both
        shards.append(tmp_path / f"shard-{part.start}.duckdb")
        with Store(shards[-1]) as store:
            ms.record(ms.load(llama(tiny_model)), corpus, store, name="run", batches=part, **options)
    merged = merge(tmp_path / "merged.duckdb", shards)
    with merged.store:
        assert merged.complete
        assert {table: rows(merged, table) for table in expected} == expected


def test_deleting_a_run_takes_its_heads(
    tiny_model: Callable[..., Any], ids: list[list[int]], record_ids: Record, store: Store
) -> None:
    kept = record_ids(llama(tiny_model), ids, name="kept", probes=["attention"])
    gone = record_ids(llama(tiny_model), ids, name="gone", probes=["attention"])
    before = rows(kept, "heads")
    store.delete_run(gone)
    assert store.fetch("SELECT count(DISTINCT run_id) FROM head_sequences") == [(1,)]
    assert rows(kept, "heads") == before


def test_the_probe_reads_nothing_back_in_a_pass() -> None:
    """Under FakeTensorMode a read back to the host has nothing to give, and fails."""
    from moescope.probes.taps import tapped

    model = build_tiny("gpt_oss", dtype=torch.bfloat16)
    anatomy = find_anatomy(model)
    probe = AttentionProbe(ProbeContext(anatomy))
    kept: dict[Any, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ids = torch.ones(2, 6, dtype=torch.int64)
        mask = ids.bool()

        def receive(site: Any, tensors: dict[str, Any]) -> None:
            kept[site] = probe.tap(site, {**tensors, "mask": mask})

        with tapped(model, anatomy, probe.sites(anatomy), receive):
            model(input_ids=ids, attention_mask=ids, use_cache=False)
    assert {site.tensor for site in kept} == {PATTERN_SLICES}
    assert all(set(found) == {"sums", "n"} for found in kept.values())


def test_the_size_of_slices_changes_nothing_but_rounding(
    tiny_model: Callable[..., Any], ids: list[list[int]], record_ids: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for size in (1, 1 << 30):
        monkeypatch.setattr(attention_slices, "SLICE_BYTES_CPU", size)
        found.append(rows(record_ids(llama(tiny_model), ids, name=str(size), probes=["attention"], batch_size=3)))
    for small, large in zip(*found, strict=True):
        np.testing.assert_allclose(small[5], large[5], rtol=1e-5, atol=1e-4)
