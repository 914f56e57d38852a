"""What hostile inputs once broke, one test each."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moescope.cli.config import read_config
from moescope.core.edit_text import read_edit
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.batches import Sequence
from moescope.probes.corpus import BadRecord, Corpus
from moescope.report.thresholds.rules import read_rules
from moescope.store.importing import files
from moescope.store.importing.import_trace import import_trace
from moescope.store.store import Store


def _refused(store: Store, path: Path, says: str, **options: Any) -> None:
    with pytest.raises(InputError, match=says):
        import_trace(store, path, name="trace", **{"n_experts": 8, "top_k": 2, **options})
    assert store.fetch("SELECT count(*) FROM runs") == [(0,)]


@pytest.mark.parametrize(
    "column",
    [pa.array([0, 2**62]).cast(pa.timestamp("us")), pa.array([0, 2**62]).cast(pa.duration("s"))],
    ids=["timestamp", "duration"],
)
def test_a_row_of_parquet_that_python_cannot_hold_is_told_with_its_number(tmp_path: Path, column: pa.Array) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", "two"], "when": column}), path)
    with pytest.raises(InputError, match="row 1 holds a value that cannot be read"):
        Corpus.load(path).facts()
    assert [type(document) is BadRecord for document in Corpus.load(path, skip_bad_lines=True).documents()] == [
        False,
        True,
    ]


def test_text_of_parquet_that_is_no_utf8_is_told_with_its_row(tmp_path: Path) -> None:
    raw = pa.array([b"one", b"caf\xe9"])
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="row 1 holds a value that cannot be read"):
        Corpus.load(tmp_path / "a.parquet").facts()


def test_a_record_that_nests_too_deep_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "one", "x": ' + "[" * 99 + "]" * 99 + '}\n{"text": "two", "x": ' + "[" * 500 + "]" * 500 + "}\n"
    )
    with pytest.raises(InputError, match="line 2 nests deeper than 100 levels"):
        Corpus.load(path).facts()


def test_numbers_of_a_record_that_json_does_not_have_are_kept_as_null(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "x": NaN, "y": [1e999], "\\ud800": 1}\n')
    (document,) = Corpus.load(path)
    kept = Sequence(0, 0, document, 0, document.text, np.array([1])).metadata_json
    assert json.loads(kept or "", parse_constant=pytest.fail) == {"x": None, "y": [None], "\ufffd": 1}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt", ".parquet", ""])
def test_a_corpus_that_never_ends_or_has_no_possible_name_is_refused(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"a{suffix}")
    with pytest.raises(InputError, match="a pipe or a device"):
        Corpus.load(tmp_path / f"a{suffix}")
    with pytest.raises(InputError, match="there is no corpus"):
        Corpus.load(tmp_path / ("x" * 300 + suffix))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".npz", ".parquet", ".pkl", ".pt"])
def test_a_trace_that_never_ends_or_has_no_possible_name_is_refused(store: Store, tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"a{suffix}")
    _refused(store, tmp_path / f"a{suffix}", "a pipe or a device")
    _refused(store, tmp_path / ("x" * 300 + suffix), "there is no file")


def test_pipes_in_a_folder_of_traces_are_passed_over(store: Store, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.parquet")
    _refused(store, tmp_path, "holds no Parquet files")


@pytest.mark.parametrize("format_", ["vllm", "sglang", "llama.cpp", "router_logits", "olmoe"])
def test_a_folder_is_no_file_of_another_program(store: Store, tmp_path: Path, format_: str) -> None:
    _refused(store, tmp_path, "is a folder", format=format_)


@pytest.mark.parametrize(
    "answer", [{"choices": 0.5}, {"choices": ["x"]}, {"prompt_routed_experts": [[[1, 2]]], "prompt_token_ids": 3}]
)
def test_a_response_of_another_shape_is_refused(store: Store, tmp_path: Path, answer: dict[str, Any]) -> None:
    (tmp_path / "a.json").write_text(json.dumps(answer))
    _refused(store, tmp_path / "a.json", "not laid out as")


def test_token_ids_that_are_no_numbers_are_refused(store: Store, tmp_path: Path) -> None:
    answer = {"prompt_routed_experts": [[[1, 2]], [[3, 4]]], "prompt_token_ids": ["a", {}]}
    (tmp_path / "a.json").write_text(json.dumps(answer))
    _refused(store, tmp_path / "a.json", "not laid out as")


def test_a_mask_of_three_axes_is_refused(store: Store, tmp_path: Path) -> None:
    scores = np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32)
    np.savez(tmp_path / "a.npz", router_logits=scores, attention_mask=np.ones((1, 2, 3)))
    _refused(store, tmp_path / "a.npz", "attention_mask .* has the shape")


def _header(shape: tuple[int, ...]) -> bytes:
    text = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def test_an_archive_that_claims_more_than_memory_holds_is_refused(store: Store, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("router_logits.npy", _header((10**15, 4)) + b"\0" * 64)
    _refused(store, tmp_path / "a.npz", "more numbers than memory holds")


def test_an_archive_that_unpacks_to_far_more_than_it_is_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_UNPACKED", 1 << 20)  # a gigabyte where no test is in a hurry
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("router_logits.npy", _header((1, 1 << 18, 8)) + bytes(8 << 20))
    assert (tmp_path / "a.npz").stat().st_size < 1 << 15
    _refused(store, tmp_path / "a.npz", "unpacks to 8,388,")


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_an_archive_of_wrong_offsets_is_refused(store: Store, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([1]))
        archive.writestr("x.npy", _header((1,)) + b"\0" * 4)
    raw = bytearray(path.read_bytes())
    place = raw.rindex(b"PK\x05\x06") + 16  # where the central directory is said to begin
    raw[place : place + 4] = (2**31 + 5).to_bytes(4, "little")
    path.write_bytes(raw)
    _refused(store, path, "cannot be read|is damaged")


def test_an_intervention_that_is_a_pipe_or_nests_without_end_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(InputError, match="a pipe or a device"):
        Intervention.load(tmp_path / "a.json")
    for text in ("[" * 100_000, '{"edits": [{"kind": "add", "vector": ' + "[" * 900 + "]" * 900 + "}]}", "9" * 5000):
        with pytest.raises(InputError, match="no intervention"):
            Intervention.from_json(text)


def test_what_was_given_is_not_repeated_whole() -> None:
    for read, given in (
        (read_edit, "x" * 100_000),
        (Intervention.from_json, json.dumps({"edits": [{"kind": "x" * 100_000}]})),
    ):
        with pytest.raises(InputError) as refused:
            read(given)
        assert len(str(refused.value)) < 5000


def test_files_of_options_and_thresholds_that_are_pipes_or_nest_without_end_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "deep.yaml").write_text("{" * 3000)
    for path in (tmp_path / "pipe.yaml", tmp_path / "deep.yaml"):
        with pytest.raises(InputError):
            read_rules(path)
        with pytest.raises(InputError):
            read_config(path, "profile", {"profile": ()})


def test_a_store_made_only_for_what_was_refused_goes_again(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(InputError), Store(tmp_path / "new.duckdb") as made:
        import_trace(made, tmp_path / "a.json", name="trace")
    assert not (tmp_path / "new.duckdb").exists()
    with Store(tmp_path / "old.duckdb"):
        pass
    with pytest.raises(InputError), Store(tmp_path / "old.duckdb") as old:
        import_trace(old, tmp_path / "a.json", name="trace")
    assert (tmp_path / "old.duckdb").exists()
