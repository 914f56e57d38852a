"""`plan` against recordings: the tokens, the bytes, what it refuses, what a budget keeps."""

from __future__ import annotations

import itertools
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moescope as ms
from moescope.core.errors import InputError, MoescopeError, RunError
from moescope.probes import measured_pass, planning
from moescope.probes.batches import BatchPlan
from moescope.probes.corpus_counts import count_tokens
from moescope.probes.peak_memory import watched
from moescope.probes.plan import Plan
from moescope.probes.plan_budget import VECTORS, read_bytes, within, written_bytes
from moescope.store.measured_bytes import bytes_before, bytes_in_use, bytes_taken

LENGTHS = [5, 40, 17, 60, 33, 8, 51, 29, 44, 12, 60, 60]
RESID = "blocks.1.hook_resid_post"


@pytest.fixture
def texts(token_ids: Callable[..., list[list[int]]]) -> ms.Corpus:
    """Token ids of many lengths, in two labels."""
    return ms.Corpus.from_token_ids(token_ids(LENGTHS * 8), labels=["one", "two"] * (4 * len(LENGTHS)))


def _recorded(model: Any, corpus: Any, folder: Path, **options: Any) -> tuple[int, Any]:
    """Bytes that a recording takes on disk, and its run's summary."""
    folder.mkdir()
    with ms.Store(folder / "runs.duckdb") as store:
        store.connection.execute("SET max_vacuum_tasks = 0")  # as a run's writer has it
        run = ms.record(model, corpus, store, name="run", progress=False, **options)
        assert run.complete
        summary = run.info["summary"]
        used = bytes_in_use(store)
    return used + sum(f.stat().st_size for f in folder.rglob("*.safetensors")), summary


def _plan(model: Any, corpus: Any, folder: Path, **options: Any) -> Plan:
    return planning.plan(model, corpus, store=folder / "runs.duckdb", progress=False, **options)


ALL = ("routing", "experts", "residual", "router_logits", "expert_outputs")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", {}),
        ("deepseek_v3", {"probes": ALL}),
        ("llama", {}),
        ("qwen3_moe", {"sites": [RESID, "blocks.0.mlp.experts.hook_out"], "sample": 0.5}),
        ("olmoe", {"generate": 3, "batch_size": 4}),
    ],
)
def test_a_recording_takes_the_tokens_and_bytes_that_were_planned(
    family: str, options: dict[str, Any], tiny_model: Any, texts: ms.Corpus, tmp_path: Path
) -> None:
    model = ms.load(tiny_model(family))
    made = _plan(model, texts, tmp_path, **options)
    taken, summary = _recorded(model, texts, tmp_path / "store", **options)
    assert made.bytes == pytest.approx(taken, rel=0.1)
    assert made.tokens - summary["tokens"] == pytest.approx(0, abs=made.generated)
    if not made.generated:
        assert made.tokens == summary["tokens"] == 8 * sum(LENGTHS)
    assert made.sequences == summary["sequences"]
    assert sum(cost.bytes for cost in made.costs) == made.bytes
    assert sum(cost.seconds for cost in made.costs) == pytest.approx(made.seconds)


def test_a_further_run_of_a_store_takes_less_by_what_is_there_already(
    tiny_model: Any, texts: ms.Corpus, tmp_path: Path
) -> None:
    model = ms.load(tiny_model("qwen3_moe"))
    first = _plan(model, texts, tmp_path)
    with ms.Store(tmp_path / "runs.duckdb") as store:
        assert bytes_before(store) == 0
        ms.record(model, texts, store, name="first", progress=False)
        before = bytes_before(store)
        further = _plan(model, texts, tmp_path)
        run = ms.record(model, texts, store, name="second", progress=False)
        assert further.bytes < first.bytes
        assert further.bytes == pytest.approx(bytes_taken(store, run.run_id, before), rel=0.1)


def test_vectors_are_counted_to_the_last_row(tiny_model: Any, texts: ms.Corpus, tmp_path: Path) -> None:
    sites = [RESID, "blocks.0.mlp.experts.hook_out"]
    model = ms.load(tiny_model("qwen3_moe"))
    made = _plan(model, texts, tmp_path, sites=sites, sample=0.3, seed=7)
    with ms.Store(tmp_path / "runs.duckdb") as store:
        ms.record(model, texts, store, name="run", sites=sites, sample=0.3, seed=7, progress=False)
        rows = store.fetch('SELECT sum("rows") FROM activations')[0][0]
    assert next(cost.rows for cost in made.costs if cost.part == VECTORS) == rows


def test_planning_leaves_no_trace(
    tiny_model: Any, texts: ms.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ms.load(tiny_model("qwen3_moe"))
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())
    _plan(model, texts, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules()) == hooks
    with ms.Store(tmp_path / "runs.duckdb") as store:  # the model is free again
        assert ms.record(model, texts, store, name="run", progress=False).complete


def test_a_plan_shows_itself(tiny_model: Any, texts: ms.Corpus, tmp_path: Path) -> None:
    made = _plan(ms.load(tiny_model("llama")), texts, tmp_path)
    frame = made.df()
    assert set(frame.part) == {"forward pass", "tokens", "residual", "the file itself"}
    assert frame.share_of_time.sum() == pytest.approx(1)
    assert set(made.left_out) == {"routing", "experts"}
    page = made._repr_html_()
    assert "share_of_time" in page
    assert "it has no routers" in page
    data = made.as_json()
    assert data["bytes"] == made.bytes
    assert len(data["costs"]) == 4
    assert made.planned() == {
        "bytes": made.bytes,
        "seconds": round(made.seconds, 3),
        "memory_bytes": made.memory_bytes,
    }
    saved = made.result.save(tmp_path / "plan.json")
    assert saved.exists()


def test_batches_count_by_the_size_they_have(
    tiny_model: Any, texts: ms.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With passes that take a microsecond a padded place, the plan takes that for all places."""
    real = measured_pass._Stream.seconds_of

    def seconds(self: Any, batch: Any) -> float:
        real(self, batch)
        return 1e-6 * measured_pass.places(batch)

    monkeypatch.setattr(measured_pass._Stream, "seconds_of", seconds)
    monkeypatch.setattr("moescope.probes.run_estimate.os.cpu_count", lambda: 10_000)
    taken: list[Any] = []
    plain = planning.measure
    monkeypatch.setattr(planning, "measure", lambda *given: taken.append(plain(*given)) or taken[-1])
    made = _plan(ms.load(tiny_model("llama")), texts, tmp_path, batch_size=4)
    lengths = (LENGTHS * 8)[: 8 * len(LENGTHS)]
    places = sum(4 * max(lengths[i : i + 4]) for i in range(0, len(lengths), 4))
    assert made.seconds == pytest.approx(1e-6 * places + taken[0].write_seconds * made.batches, rel=1e-6)


def test_long_answers_are_counted_by_their_length(
    tiny_model: Any, token_ids: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(self: Any, batch: Any, generate: int) -> float:
        real(self, batch, generate)
        return 2.0 + 0.25 * generate

    real = measured_pass._Stream._run
    monkeypatch.setattr(measured_pass._Stream, "_run", seconds)
    taken: list[Any] = []
    plain = planning.measure
    monkeypatch.setattr(planning, "measure", lambda *given: taken.append(plain(*given)) or taken[-1])
    corpus = ms.Corpus.from_token_ids(token_ids([12, 9]))
    _plan(ms.load(tiny_model("olmoe")), corpus, tmp_path, generate=20)
    assert list(taken[0].seconds.values()) == [pytest.approx(2.0 + 0.25 * 20)]


def test_tokens_of_a_large_corpus_are_estimated_within_their_error() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 90, 3_000)
    corpus = ms.Corpus.from_token_ids([[1] * int(n) for n in lengths])
    plan = BatchPlan(corpus, None, 8, 64, 97)
    exact = count_tokens(plan, seconds=1e9)
    assert exact.exact
    assert (exact.tokens, exact.error) == (int(lengths.sum()), 0.0)
    assert exact.sequences == 3_000 + int((lengths > 64).sum())
    rough = count_tokens(plan, seconds=-1.0, sample=200)
    assert rough.tokens == exact.tokens  # of token ids each counts as one character
    assert rough.sequences == pytest.approx(exact.sequences, rel=0.1)
    assert rough.batches == -(-rough.sequences // 8)
    assert not rough.exact


def test_estimated_tokens_of_texts_have_an_honest_error(demo_model: Any) -> None:
    corpus = ms.Corpus.load("demo")
    plan = BatchPlan(corpus, demo_model.tokenizer, 8, 512)
    exact = count_tokens(plan, seconds=1e9)
    misses = []
    for seed in range(20):
        rough = count_tokens(plan, seconds=-1.0, sample=40, seed=seed)
        assert 0 < rough.error < 0.2
        misses.append((rough.tokens - exact.tokens) / exact.tokens / rough.error)
    assert max(map(abs, misses)) < 4
    assert 0.4 < float(np.std(misses)) < 1.8  # in units of the error said, misses spread by about one
    assert exact.text_bytes > sum(len(d.text) for d in corpus)


def test_peak_memory_sees_what_was_held_for_a_moment() -> None:
    with watched([]) as peak:
        held = np.ones(64 << 20, np.uint8)
        del held
    assert 60 << 20 < peak.added < 200 << 20


@pytest.mark.parametrize(
    ("said", "bytes_"),
    [
        ("2GB", 2 * 10**9),
        ("2 GiB", 2**31),
        ("1.5kb", 1500),
        (".5MB", 500_000),
        ("77", 77),
        (12, 12),
        ("3 tib", 3 * 2**40),
    ],
)
def test_amounts_are_read(said: str | int, bytes_: int) -> None:
    assert read_bytes(said) == bytes_


@pytest.mark.parametrize("said", ["", "GB", "2 Gb/s", "-3MB", "0", "0.2B", "2XB", "nan", "1e3", 0, -1, True])
def test_what_is_no_amount_is_refused(said: str | int) -> None:
    with pytest.raises(InputError, match="number of bytes"):
        read_bytes(said)


def test_written_amounts_read_back() -> None:
    for size in (1, 999, 1_000, 20_449_999, 3 * 10**12):
        assert read_bytes(written_bytes(size)) == pytest.approx(size, rel=0.005)


_COSTS = {"tokens": 100, "routing": 700, "residual": 400, "experts": 50, VECTORS: 100}


def _size(probes: Sequence[str], sample: float) -> int:
    return sum(_COSTS[name] for name in probes) + (int(5_000 * sample) if VECTORS in probes else 0)


def test_a_budget_that_fits_changes_nothing() -> None:
    kept = within(10_000, list(_COSTS), 1.0, _size)
    assert (kept.probes, kept.sample, kept.lost) == (tuple(_COSTS), 1.0, ())


@pytest.mark.parametrize("budget", range(100, 6_400, 90))
def test_a_budget_is_kept_and_used(budget: int) -> None:
    kept = within(budget, list(_COSTS), 1.0, _size)
    assert _size(kept.probes, kept.sample) <= budget
    assert "tokens" in kept.probes
    every = [
        ("tokens", *chosen)
        for n in range(len(_COSTS))
        for chosen in itertools.combinations([p for p in _COSTS if p != "tokens"], n)
    ]
    if len(kept.probes) == len(_COSTS):
        # As many vectors as fit: another hundredth would not.
        assert kept.sample == 1.0 or _size(kept.probes, kept.sample * 1.02) > budget
    else:
        # Nothing is left out for its own sake: no other choice with the least sample has one probe more.
        assert not any(_size(p, 0.01) <= budget for p in every if len(p) == len(_COSTS))
        assert any("left out" in loss for loss in kept.lost)


def test_the_dearest_probe_goes_first() -> None:
    kept = within(
        _size(["tokens", "residual", "experts"], 0.0), ["tokens", "routing", "residual", "experts"], 1.0, _size
    )
    assert kept.probes == ("tokens", "residual", "experts")
    assert kept.lost == ("left out: routing (700 B)",)


def test_a_budget_below_the_tokens_is_refused_with_what_they_need() -> None:
    with pytest.raises(InputError, match=r"at least 100 B"):
        within(99, list(_COSTS), 1.0, _size)


def test_what_a_budget_leaves_is_recorded_within_it(tiny_model: Any, texts: ms.Corpus, tmp_path: Path) -> None:
    model = ms.load(tiny_model("qwen3_moe"))
    asked: dict[str, Any] = {"probes": ALL, "sites": [RESID, "blocks.0.mlp.experts.hook_out"]}
    free = _plan(model, texts, tmp_path, **asked)
    budget = free.bytes - 2 * 400_000  # most of the vectors have to go
    made = _plan(model, texts, tmp_path, budget=budget, **asked)
    assert made.bytes <= budget
    assert made.sample < 1
    assert made.seconds > 0
    assert any("vectors of" in note for note in made.notes)
    taken, _ = _recorded(
        model,
        texts,
        tmp_path / "store",
        probes=[name for name in made.probes if name != VECTORS],
        sites=made.sites,
        sample=made.sample,
    )
    assert taken <= budget * 1.05


_Disk = namedtuple("_Disk", "total used free")


def test_a_disk_too_small_is_refused_with_a_budget_that_fits(
    tiny_model: Any, texts: ms.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ms.load(tiny_model("qwen3_moe"))
    whole = _plan(model, texts, tmp_path, probes=ALL)
    free = whole.bytes + planning._SPARE - 500_000
    monkeypatch.setattr(planning, "_free_disk", lambda folder: free)
    with pytest.raises(InputError, match="does not fit the disk") as refused:
        _plan(model, texts, tmp_path, probes=ALL)
    assert "left out" in str(refused.value)
    said = str(refused.value).split("budget=")[1].split(" (--budget)")[0]
    assert _plan(model, texts, tmp_path, probes=ALL, budget=said).bytes <= free


def test_memory_too_small_is_refused_with_a_batch_that_fits(
    tiny_model: Any, texts: ms.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ms.load(tiny_model("llama"))
    monkeypatch.setattr(planning, "free_host", lambda: 1_000)
    with pytest.raises(InputError, match="does not fit the memory"):
        _plan(model, texts, tmp_path)
    first = measured_pass.Peak(before=0, host=80_000)
    batches = list(BatchPlan(texts, None, 8, 512))
    monkeypatch.setattr(measured_pass, "free_host", lambda: 40_000)
    with pytest.raises(InputError, match=r"batch_size=4 would fit"):
        measured_pass._check_memory(first, batches[0], batches[0])
    monkeypatch.setattr(measured_pass, "free_host", lambda: None)
    measured_pass._check_memory(first, batches[0], batches[0])  # unknown: nothing to hold it against


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": "much"}, "number of bytes"),
        ({"budget": "1KB"}, "at least"),
        ({"store": "nowhere/at/all.duckdb"}, "no folder"),
        ({"sites": ["blocks.9.hook_resid_post"]}, "no site"),
        ({"probes": ["routing"]}, "nothing for the probe"),
        ({"sample": 0.0}, "share of the tokens"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    options: dict[str, Any], words: str, tiny_model: Any, token_ids: Any, tmp_path: Path
) -> None:
    corpus = ms.Corpus.from_token_ids(token_ids([9, 4]))
    with pytest.raises(InputError, match=words):
        planning.plan(
            ms.load(tiny_model("llama")), corpus, progress=False, **{"store": tmp_path / "runs.duckdb", **options}
        )


def test_a_model_that_fails_is_told_as_one(
    tiny_model: Any, texts: ms.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ms.load(tiny_model("llama"))

    def fail(*_: Any) -> float:
        raise ValueError("a kernel broke")

    monkeypatch.setattr(measured_pass._Stream, "seconds_of", fail)
    with pytest.raises(RunError, match="a kernel broke") as failed:
        _plan(model, texts, tmp_path)
    assert isinstance(failed.value, MoescopeError)
    monkeypatch.undo()
    assert _plan(model, texts, tmp_path).tokens == 8 * sum(LENGTHS)  # and the model is free again
