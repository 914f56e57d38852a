"""Merging shards: the same rows as one recording of everything, or a clear refusal that leaves nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

import moescope as ms
from moescope.core.errors import InputError, RunError, StoreError
from moescope.store import merge_totals, merging
from moescope.store.measured_bytes import bytes_in_use
from moescope.store.merge_rows import copied_tables, foreign_tables, is_token
from moescope.store.merging import merge
from moescope.store.run import Run
from moescope.store.schema import TABLES
from moescope.store.store import Store
from moescope.store.vectors import vector_shards, vector_sites

LENGTHS = (7, 1, 12, 4, 9, 30, 2, 15, 11, 3, 3, 8, 20, 5, 5, 6, 1)
LABELS = ["a", "b", "a", "c", "b", "a", "a", "c", "b", "a", "a", "b", "d", "d", "a", "a", "b"]
BATCHES = 9  # of 2 sequences
TIMINGS = {"seconds", "tokens_per_second", "actual"}
Record = Callable[..., Path]

PROBES = ("tokens", "routing", "experts", "residual", "router_logits", "expert_outputs")
# What is recorded → how: everything a probe can write, answers as well as texts, a dense model.
PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "every probe": ("qwen3_moe", {"probes": PROBES}),
    "answers": ("olmoe", {"generate": 3}),
    "vectors": ("qwen2_moe", {"sites": ["blocks.1.hook_resid_post", "blocks.0.mlp.experts.hook_out"], "sample": 0.6}),
    "dense": ("llama", {}),
}
# Shards as ranges of batches; some overlap, some are one batch long, some are given in another order than the plan's.
CUTS: dict[str, list[range]] = {
    "2 shards": [range(4), range(4, 9)],
    "2 overlapping": [range(6), range(3, 9)],
    "3 shards, backwards": [range(7, 9), range(2, 7), range(2)],
    "3, one inside another": [range(9), range(2, 4), range(5, 6)],
    "5 shards": [range(1), range(1, 2), range(2, 5), range(5, 8), range(8, 9)],
    "5 with overlaps": [range(3), range(2, 5), range(4, 6), range(4, 8), range(6, 9)],
}


@pytest.fixture(scope="module")
def recorded(tiny_model: Any, token_ids: Any, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """`recorded(plan, batches)`: a store with those batches of a plan, or all of them (None); made once."""
    folder = tmp_path_factory.mktemp("shards")
    models: dict[str, Any] = {}

    def make(plan: str, batches: range | None = None) -> Path:
        from moescope.probes.plan_walk import PlanWalk
        from moescope.probes.workers.shard_recording import ShardRecording

        family, options = PLANS[plan]
        path = folder / f"{plan}-{'whole' if batches is None else f'{batches.start}-{batches.stop}'}.duckdb"
        if path.exists():
            return path
        if plan not in models:
            models[plan] = ms.load(tiny_model(family))
        corpus = ms.Corpus.from_token_ids(token_ids(LENGTHS), labels=LABELS)
        given = {"batch_size": 2, "name": "base", **options}
        with Store(path) as store:
            if batches is None:
                ms.record(models[plan], corpus, store, progress=False, **given)
            else:
                trial = ShardRecording(models[plan], corpus, store, batches=[], plan_batches=None, rules=None, **given)
                walk = PlanWalk(trial.whole)
                found = walk.take(batches)
                ShardRecording(
                    models[plan], corpus, store, batches=found, plan_batches=walk.length, rules=None, **given
                ).run(progress=False)
        return path

    return make


def contents(run: Run) -> dict[str, Any]:
    """Every row of every table, without run_id; of `runs` what a plan decides; of vectors the vectors, not their files."""
    found: dict[str, Any] = {}
    for table in TABLES:
        if table.name not in ("runs", "activations") and "run_id" in {column.name for column in table.columns}:
            query = f'SELECT * EXCLUDE (run_id) FROM "{table.name}" WHERE run_id = ? ORDER BY ALL'
            found[table.name] = run.store.fetch(query, [run.run_id])
    columns = "name, model, revision, architecture, settings, versions, seed, corpus_fingerprint, status, anatomy"
    found["runs"] = run.store.fetch(f"SELECT {columns} FROM runs WHERE run_id = ?", [run.run_id])
    found["summary"] = {key: value for key, value in run.info["summary"].items() if key not in TIMINGS}
    for site in vector_sites(run):
        files = list(vector_shards(run, site, verify=True))
        order = np.argsort(np.concatenate([f.token for f in files]), kind="stable")
        found[site] = [
            np.concatenate([getattr(f, name) for f in files])[order].tolist()
            for name in ("raw", "token", "expert")
            if getattr(files[0], name) is not None
        ]
    return found


def whole_of(path: Path) -> dict[str, Any]:
    with Store(path, read_only=True) as store:
        return contents(store.run("base"))


def merged_contents(out: Path, shards: Sequence[Path], **options: Any) -> dict[str, Any]:
    run = merge(out, shards, **options)
    with run.store:
        return contents(run)


@pytest.mark.parametrize(
    "cut", [pytest.param(c, marks=pytest.mark.slow) if c[0] == "5" or "backwards" in c else c for c in CUTS]
)
@pytest.mark.parametrize("plan", PLANS)
def test_merged_rows_are_those_of_an_unbroken_run(plan: str, cut: str, recorded: Record, tmp_path: Path) -> None:
    shards = [recorded(plan, batches) for batches in CUTS[cut]]
    overlap = sum(map(len, CUTS[cut])) > BATCHES
    if plan == "vectors" and "overlap" in cut:
        with pytest.raises(InputError, match="has vectors, and"):
            merge(tmp_path / "runs.duckdb", shards)
        assert list(tmp_path.iterdir()) == []
        return
    expected, found = whole_of(recorded(plan)), merged_contents(tmp_path / "runs.duckdb", shards)
    assert found["runs"][0][8] == "complete"
    counts_of_decisions = {"near_ties", "near_ties_by_router", "rule_agreement_by_router"}
    if overlap and cut != "3, one inside another" and plan != "dense":
        # What the probes count as they go is not in the rows, so of half a shard nobody can say it.
        assert set(found["summary"].pop("not_merged")) == counts_of_decisions
        for name in counts_of_decisions:
            del expected["summary"][name]
    for table, rows in expected.items():
        assert found[table] == rows, table
    assert found.keys() == expected.keys()
    assert len(expected["tokens"]) >= sum(LENGTHS)
    assert len(expected["batches"]) == BATCHES


def test_rows_lie_in_the_order_of_the_plan(recorded: Record, tmp_path: Path) -> None:
    shards = [recorded("every probe", r) for r in CUTS["3 shards, backwards"]]
    run = merge(tmp_path / "runs.duckdb", shards)
    with run.store as store:
        for table in ("tokens", "sequences", "batches"):
            column = {"tokens": "token", "sequences": "sequence_id", "batches": "batch"}[table]
            found = [n for (n,) in store.fetch(f"SELECT {column} FROM {table} ORDER BY rowid")]
            assert found == sorted(found)


def test_a_merged_run_says_what_it_took_in_all(recorded: Record, tmp_path: Path) -> None:
    shards = [recorded("every probe", r) for r in CUTS["2 shards"]]
    with ExitStack() as stack:
        took = [stack.enter_context(Store(s, read_only=True)).run("base").info["summary"]["actual"] for s in shards]
    with merge(tmp_path / "runs.duckdb", shards).store as store:
        said = store.run("base").info["summary"]["actual"]
        assert said["seconds"] == pytest.approx(sum(one["seconds"] for one in took), abs=0.01)
        assert said["bytes"] == pytest.approx(bytes_in_use(store), rel=0.1)


@pytest.mark.slow
def test_a_merged_run_can_be_merged_again(recorded: Record, tmp_path: Path) -> None:
    some = [recorded("every probe", r) for r in (range(2), range(5, 8))]
    rest = [recorded("every probe", r) for r in (range(2, 5), range(8, 9))]
    for name, shards in (("some", some), ("rest", rest)):
        run = merge(tmp_path / f"{name}.duckdb", shards)
        assert run.status == "incomplete"
        run.store.close()
    found = merged_contents(tmp_path / "all.duckdb", [tmp_path / "rest.duckdb", tmp_path / "some.duckdb"])
    assert found == whole_of(recorded("every probe"))


def test_a_run_is_merged_into_a_store_that_has_others(recorded: Record, tmp_path: Path) -> None:
    out = tmp_path / "runs.duckdb"
    shutil.copy(recorded("dense"), out)
    shards = [recorded("every probe", r) for r in CUTS["2 shards"]]
    with Store(out) as store:
        before = contents(store.run("base"))
        run = merge(store, shards, name="second")
        assert run.store is store
        assert contents(store.run("base")) == before
        expected = whole_of(recorded("every probe"))
        expected["runs"] = [("second", *expected["runs"][0][1:])]
        assert contents(run) == expected
        assert store.fetch("SELECT count(*) FROM duckdb_tables() WHERE temporary") == [(0,)]


@pytest.mark.parametrize(
    ("shards", "told"),
    [
        ([range(3), range(5, 9)], "no shard has batches 3 to 4 of the plan's 9"),
        ([range(1, 2), range(8, 9)], "no shard has batches 0, 2 to 7 of the plan's 9"),
        ([range(8)], "no shard goes on to the end of the plan, after batch 7"),
        ([range(2), range(3, 8)], "no shard has batch 2 of the plan"),
    ],
)
def test_missing_batches_make_the_run_incomplete_and_are_named(
    shards: list[range], told: str, recorded: Record, tmp_path: Path
) -> None:
    run = merge(tmp_path / "runs.duckdb", [recorded("every probe", r) for r in shards])
    with run.store:
        assert run.status == "incomplete"
        assert run.info["summary"]["stopped"] == told
        ledger = {row["site"]: row for row in run.coverage.table.to_pylist()}
        assert told in ledger["documents"]["detail"]
        assert ledger["documents"]["status"] in ("short", "invalid")
        assert {row["status"] for site, row in ledger.items() if site != "documents"} == {"complete"}


def test_the_end_of_a_document_cannot_be_missing_unseen(tiny_model: Any, tmp_path: Path, recorded: Record) -> None:
    """Every document is there, but not all of the last one: its first part alone gives it a row."""
    from moescope.probes.plan_walk import PlanWalk
    from moescope.probes.workers.shard_recording import ShardRecording

    model, corpus = ms.load(tiny_model("llama")), ms.Corpus.from_token_ids([[5] * 10, [7] * 40])
    options: dict[str, Any] = {"name": "base", "batch_size": 2, "max_length": 10}
    with Store(tmp_path / "shard.duckdb") as store:
        walk = PlanWalk(
            ShardRecording(model, corpus, store, batches=[], plan_batches=None, rules=None, **options).whole
        )
        first = walk.take(range(1))
        ShardRecording(model, corpus, store, batches=first, plan_batches=walk.length, rules=None, **options).run(
            progress=False
        )
    run = merge(tmp_path / "runs.duckdb", [tmp_path / "shard.duckdb"])
    with run.store:
        ledger = {row["site"]: row for row in run.coverage.table.to_pylist()}
        assert (ledger["documents"]["recorded"], ledger["documents"]["expected"]) == (2, 2)
        assert ledger["documents"]["status"] == "invalid"
        assert run.status == "incomplete"


def altered(path: Path, target: Path, *statements: str) -> Path:
    """A copy of a store, changed."""
    shutil.copy(path, target)
    with duckdb.connect(str(target)) as connection:
        for statement in statements:
            connection.execute(statement)
    return target


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE runs SET corpus_fingerprint = 'another'", ["corpus_fingerprint differ", "Found: another"]),
        ("UPDATE runs SET model = 'other'", ["their model differ", "Found: other"]),
        ("UPDATE runs SET revision = 'abc'", ["their revision differ", "Found: abc"]),
        ("UPDATE runs SET seed = 7", ["their seed differ", "Found: 7"]),
        ("""UPDATE runs SET intervention = '{"edits": []}'""", ["their intervention differ"]),
        (
            """UPDATE runs SET settings = json_merge_patch(settings, '{"max_length": 9, "threads": 77}')""",
            ["their settings differ", "max_length: 9", "threads: 77", "max_length: 64"],
        ),
        (
            """UPDATE runs SET versions = json_merge_patch(versions, '{"torch": "1.0"}')""",
            ["their versions differ", "torch: 1.0"],
        ),
        ("UPDATE layers SET top_k = 3", ["their layers differ"]),
        ("DELETE FROM coverage WHERE site = 'tokens'", ["their recorded sites differ"]),
        ("DELETE FROM coverage", ["has no coverage ledger", "--resume"]),
        ("UPDATE runs SET corpus_fingerprint = NULL", ["does not say which corpus"]),
        ("DELETE FROM tokens WHERE token = 3", ["is not whole", "tokens"]),
        ("DELETE FROM sequences WHERE sequence_id = 14", ["is not whole", "sequences"]),
        (
            "UPDATE sequences SET content_hash = 'x' WHERE sequence_id = 7",
            ["another sequence 7", "Found: x"],
        ),
        (
            "UPDATE batches SET first_sequence = first_sequence + 1",
            ["not parts of one plan", "batch 3", "2 sequences from 6"],
        ),
        ("INSERT INTO heads SELECT run_id, 0, 0, 'm', 'c', 1, 1, 'attn' FROM runs", ["rows of heads are put together"]),
        (
            "UPDATE coverage SET recorded = recorded - 1, status = 'short' WHERE site LIKE '%expert_indices'",
            ["overlaps other shards in part"],
        ),
    ],
)
def test_shards_that_do_not_fit_are_refused_and_nothing_is_left(
    statement: str, words: list[str], recorded: Record, tmp_path: Path
) -> None:
    first = recorded("every probe", range(6))
    second = altered(recorded("every probe", range(3, 9)), tmp_path / "second.duckdb", statement)
    out = tmp_path / "new" / "runs.duckdb"
    out.parent.mkdir()
    with pytest.raises(InputError) as refused:
        merge(out, [first, second])
    for word in words:
        assert word in str(refused.value)
    assert list(out.parent.iterdir()) == []


def test_a_gap_in_a_shard_stays_a_gap(recorded: Record, tmp_path: Path) -> None:
    """One decision is lacking, and a site's records were found faulty: the merged ledger says both."""
    spoilt = altered(
        recorded("every probe", range(4)),
        tmp_path / "spoilt.duckdb",
        """
        UPDATE coverage
        SET recorded = recorded - 2, status = 'short', detail = '2 events are missing: a tap fell out'
        WHERE site = 'blocks.0.mlp.hook_expert_indices'
        """,
        "UPDATE coverage SET status = 'invalid', detail = 'some activations are NaN' WHERE site = 'blocks.1.hook_resid_post'",
    )
    run = merge(tmp_path / "runs.duckdb", [spoilt, recorded("every probe", range(4, 9))])
    with run.store:
        assert run.status == "incomplete"
        bad = {r["site"]: r for r in run.coverage.table.to_pylist() if r["status"] != "complete"}
    assert set(bad) == {"blocks.0.mlp.hook_expert_indices", "blocks.1.hook_resid_post"}
    short, invalid = bad["blocks.0.mlp.hook_expert_indices"], bad["blocks.1.hook_resid_post"]
    assert (short["status"], short["expected"] - short["recorded"]) == ("short", 2)
    assert short["expected"] == 2 * sum(LENGTHS)
    assert "a tap fell out" in short["detail"]
    assert (invalid["status"], invalid["detail"]) == ("invalid", "some activations are NaN")


def test_batches_that_an_interrupted_shard_lost_may_come_from_another(recorded: Record, tmp_path: Path) -> None:
    """It expected more than it committed; another shard has the rest, so nothing is missing."""
    lost = 2 + 15  # tokens of batch 3
    k = {"routing": 2, "experts": 2, "expert_outputs": 2}
    interrupted = altered(
        recorded("every probe", range(3)),
        tmp_path / "interrupted.duckdb",
        f"UPDATE coverage SET expected = expected + {lost}, status = 'short' WHERE site = 'tokens' OR site LIKE '%resid_post'"
        " OR site LIKE '%router_logits'",
        f"UPDATE coverage SET expected = expected + {k['routing'] * lost}, status = 'short' WHERE site LIKE '%mlp.%' AND"
        " site NOT LIKE '%router_logits'",
        f"UPDATE coverage SET expected = expected + {lost - 2}, status = 'short' WHERE site = 'tokens.nll'",
        "UPDATE coverage SET expected = expected + 2, status = 'short' WHERE site = 'sequences' OR site LIKE '% median'",
        """UPDATE runs SET status = 'incomplete', summary = json_merge_patch(summary, '{"stopped": "interrupted"}')""",
    )
    found = merged_contents(tmp_path / "runs.duckdb", [interrupted, recorded("every probe", range(3, 9))])
    expected = whole_of(recorded("every probe"))
    assert found["coverage"] == expected["coverage"]
    assert found["runs"] == expected["runs"]
    assert found["summary"]["stopped"] is None


def test_a_shard_of_a_killed_recorder_beside_a_whole_one_is_not_needed(recorded: Record, tmp_path: Path) -> None:
    """A retried task: its first shard is whole too, only later. It is taken once."""
    again = shutil.copy(recorded("every probe", range(4)), tmp_path / "again.duckdb")
    shards = [recorded("every probe", range(4)), recorded("every probe", range(4, 9)), Path(again)]
    assert merged_contents(tmp_path / "runs.duckdb", shards) == whole_of(recorded("every probe"))


def test_equal_texts_stay_two(tiny_model: Any, tmp_path: Path) -> None:
    from moescope.probes.plan_walk import PlanWalk
    from moescope.probes.workers.shard_recording import ShardRecording

    model, corpus = ms.load(tiny_model("llama")), ms.Corpus.from_token_ids([[5, 6, 7]] * 4)
    paths = [tmp_path / f"{n}.duckdb" for n in range(2)]
    for number, path in enumerate(paths):
        with Store(path) as store:
            options: dict[str, Any] = {"name": "base", "batch_size": 2, "rules": None}
            walk = PlanWalk(ShardRecording(model, corpus, store, batches=[], plan_batches=None, **options).whole)
            batches = walk.take(range(number, number + 1))
            ShardRecording(model, corpus, store, batches=batches, plan_batches=walk.length, **options).run(
                progress=False
            )
    run = merge(tmp_path / "runs.duckdb", paths)
    with run.store as store:
        assert run.complete
        assert run.rows("sequences") == 4
        assert store.fetch("SELECT count(DISTINCT content_hash) FROM sequences") == [(1,)]
        assert store.fetch("SELECT token FROM tokens ORDER BY rowid") == [(n,) for n in range(12)]


@pytest.mark.slow
def test_totals_are_added_in_batch_order_whatever_the_slices(
    recorded: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of very different size, so that any other order of adding gives another sum; truth is a plain loop."""
    spread = "UPDATE load_partials SET weight_sum = weight_sum * pow(10, (batch * 7 + expert) % 17 - 8)"
    shards = [
        altered(recorded("every probe", r), tmp_path / f"{r.start}.duckdb", spread) for r in CUTS["3 shards, backwards"]
    ]
    for number, rows in enumerate((1, 40, 500_000)):
        monkeypatch.setattr(merge_totals, "ROWS_A_FOLD", rows)
        run = merge(tmp_path / f"runs-{number}.duckdb", shards)
        with run.store as store:
            query = """
                SELECT layer, block, label, phase, expert, weight_sum
                FROM load_partials
                WHERE run_id = ?
                ORDER BY batch
            """
            sums: dict[Any, float] = {}
            for *key, weight in store.fetch(query, [run.run_id]):
                sums[tuple(key)] = sums.get(tuple(key), 0.0) + weight
            backwards: dict[Any, float] = {}
            for *key, weight in store.fetch(query + " DESC", [run.run_id]):
                backwards[tuple(key)] = backwards.get(tuple(key), 0.0) + weight
            found = {
                tuple(key): weight
                for *key, weight in store.fetch("SELECT layer, block, label, phase, expert, weight_sum FROM loads")
            }
        assert sums != backwards
        assert {key: weight for key, weight in found.items() if weight} == sums
        assert set(sums) < set(found)


def test_of_equal_maxima_the_earlier_token_stays(recorded: Record, tmp_path: Path) -> None:
    flat = "UPDATE expert_partials SET max_abs_out = 1.5"
    shards = [altered(recorded("every probe", r), tmp_path / f"{r.start}.duckdb", flat) for r in CUTS["2 shards"]]
    run = merge(tmp_path / "runs.duckdb", list(reversed(shards)))
    with run.store as store:
        first: dict[Any, tuple[int, int]] = {}
        query = "SELECT layer, expert, max_abs_channel, max_abs_token FROM expert_partials ORDER BY batch"
        for layer, expert, channel, token in store.fetch(query):
            first.setdefault((layer, expert), (channel, token))
        query = "SELECT layer, expert, max_abs_channel, max_abs_token FROM experts WHERE tokens > 0"
        assert {(layer, expert): (c, t) for layer, expert, c, t in store.fetch(query)} == first


def test_vectors_of_shards_are_checked_and_a_failed_merge_takes_its_files_away(
    recorded: Record, tmp_path: Path
) -> None:
    source = recorded("vectors", range(4, 9))
    broken = tmp_path / "shards"
    shutil.copytree(source.with_suffix(".vectors"), broken / source.with_suffix(".vectors").name)
    shard = Path(shutil.copy(source, broken / source.name))
    file = sorted(broken.rglob("*.safetensors"))[-1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    out = tmp_path / "out" / "runs.duckdb"
    out.parent.mkdir()
    with pytest.raises(StoreError, match="is not the file that was recorded"):
        merge(out, [recorded("vectors", range(4)), shard])
    assert list(out.parent.iterdir()) == []


def test_a_merge_that_fails_late_leaves_the_store_as_it_was(
    recorded: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs.duckdb"
    shutil.copy(recorded("dense"), out)

    def fail(*_: Any) -> None:
        raise duckdb.IOException("Could not write file: No space left on device")

    monkeypatch.setattr(merging, "settle", fail)
    with Store(out) as store:
        before = contents(store.run("base"))
        rows = store.fetch("SELECT count(*) FROM routing")
        with pytest.raises(RunError, match=r"no room for the merged run.*nothing was merged"):
            merge(store, [recorded("every probe", r) for r in CUTS["2 shards"]], name="second")
        assert [run.name for run in store.runs()] == ["base"]
        assert contents(store.run("base")) == before
        assert store.fetch("SELECT count(*) FROM routing") == rows
    assert not out.with_suffix(".vectors").exists()


@pytest.mark.parametrize("fail_at", ["copying", "adding up"])
def test_ctrl_c_in_a_merge_leaves_nothing(fail_at: str, recorded: Record, tmp_path: Path) -> None:
    def interrupt(stage: str) -> None:
        if stage.startswith(fail_at):
            raise KeyboardInterrupt

    shards = [recorded("vectors", r) for r in CUTS["2 shards"]]
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "runs.duckdb", shards, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_refused(recorded: Record, tmp_path: Path) -> None:
    out, shard = tmp_path / "runs.duckdb", recorded("every probe", range(4))
    with pytest.raises(InputError, match="nothing to merge"):
        merge(out, [])
    with pytest.raises(InputError, match="given twice"):
        merge(out, [shard, shard])
    with pytest.raises(InputError, match="both a shard and the store"):
        merge(shard, [shard])
    with pytest.raises(StoreError, match="there is no store at"):
        merge(out, [tmp_path / "none.duckdb"])
    other = altered(shard, tmp_path / "other.duckdb", "UPDATE runs SET name = 'other'")
    with pytest.raises(InputError, match="needs a name"):
        merge(out, [other, recorded("every probe", range(4, 9))])
    with pytest.raises(InputError, match="name of Unicode text"):
        merge(out, [shard], name=" ")
    taken = Path(shutil.copy(shard, tmp_path / "taken.duckdb"))
    with pytest.raises(InputError, match="already has a run called 'base'"):
        merge(taken, [recorded("every probe", range(4, 9))])
    with Store(taken, read_only=True) as store, pytest.raises(InputError, match="open for reading only"):
        merge(store, [shard], name="second")
    assert not out.exists()


def test_of_a_store_with_several_runs_one_is_named(recorded: Record, tmp_path: Path) -> None:
    both = tmp_path / "both.duckdb"
    with Store(both) as store:
        merge(store, [recorded("every probe", range(4))], name="first")
        merge(store, [recorded("every probe", range(4))], name="again")
    with pytest.raises(InputError, match="it has 2 runs"):
        merge(tmp_path / "runs.duckdb", [both])
    run = merge(tmp_path / "runs.duckdb", [both], run="again", name="one")
    with run.store:
        assert run.rows("batches") == 4


def test_every_table_of_runs_is_merged_or_refused() -> None:
    """A table that is added to the schema must not be forgotten: it is copied by its key, or refused where it has rows."""
    of_runs = {table.name for table in TABLES if any(c.name == "run_id" for c in table.columns)}
    copied, foreign = ({table.name for table in tables} for tables in (copied_tables(), foreign_tables()))
    own_way = of_runs - copied - foreign
    assert own_way == {"runs", "layers", "vocabulary", "coverage", "activations", "loads", "experts", "heads"}
    assert not copied & foreign
    assert {
        "routing",
        "tokens",
        "residual",
        "router_logits",
        "massive_activations",
        "sequences",
        "batches",
        "head_sequences",
    } <= copied
    moved = {(t.name, c.name) for t in TABLES for c in t.columns if is_token(c)}
    told = {(t.name, c.name) for t in TABLES for c in t.columns if "token" in c.name and c.type == "BIGINT"}
    assert told - moved == {(t.name, "tokens") for t in TABLES for c in t.columns if c.name == "tokens"}
