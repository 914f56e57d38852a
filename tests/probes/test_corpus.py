"""Corpora of every kind give the same documents; what cannot be read is named, or counted where that was asked for."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moescope as ms
from moescope.probes import corpus_files
from moescope.probes.corpus import whole_characters

ROWS = [
    {"text": "First, a text.", "label": "a", "source": "here", "page": 3},
    {"text": 'Zweiter Text: "ä, ö"\nmit Zeilen.', "label": "b", "source": "dort", "page": 4},
    {"text": "三つ目の文。 👩‍🔬", "label": "a", "source": "そこ", "page": 5},
]


def write_jsonl(folder: Path) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def write_csv(folder: Path) -> Path:
    path = folder / "texts.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def write_parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "texts.parquet")
    return folder / "texts.parquet"


def as_dataset(_folder: Path) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(ROWS)


def as_streamed_dataset(_folder: Path) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(ROWS).to_iterable_dataset()


def found_in(source: Any, **options: Any) -> list[tuple[str, str | None, str | None, dict[str, str]]]:
    corpus = ms.Corpus.load(source, **options)
    return [(d.text, d.label, d.source, {k: str(v) for k, v in d.metadata.items()}) for d in corpus]


@pytest.mark.parametrize(
    "make",
    [write_jsonl, write_csv, write_parquet, as_dataset, as_streamed_dataset, lambda _: ROWS, lambda _: tuple(ROWS)],
)
def test_every_kind_of_corpus_gives_the_same_documents(make: Callable[[Path], Any], tmp_path: Path) -> None:
    source = make(tmp_path)
    expected = [(row["text"], row["label"], row["source"], {"page": str(row["page"])}) for row in ROWS]
    assert found_in(source) == expected
    corpus = ms.Corpus.load(source)
    assert [d.text for d in corpus] == [d.text for d in corpus], "a corpus can be walked again and again"
    facts = corpus.facts()
    assert facts.documents == 3
    assert facts.characters == sum(len(row["text"]) for row in ROWS)
    assert facts.labels == {"a": 2, "b": 1}
    assert facts.fingerprint == ms.Corpus.load(ROWS).facts().fingerprint


def test_fields_can_have_other_names() -> None:
    rows = [{"body": "text of it", "domain": 7, "text": "not this"}]
    (document,) = ms.Corpus.load(rows, text_field="body", label_field="domain")
    assert (document.text, document.label, document.metadata) == ("text of it", "7", {"text": "not this"})


def test_a_txt_file_is_one_document_and_its_byte_order_mark_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert [d.text for d in ms.Corpus.load(path)] == ["one\r\ntwo\n"]


@pytest.mark.parametrize("piece", [4, 7, 10, 100])
def test_a_long_txt_file_comes_in_pieces_that_end_with_a_line(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_files, "_PIECE", piece)
    text = "".join(f"line {n} ä\n" for n in range(9)) + "no end"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = [d.text for d in ms.Corpus.load(tmp_path / "a.txt")]
    assert "".join(pieces) == text
    assert len(pieces) == 1 if piece == 100 else len(pieces) > 1
    assert all(part.endswith("\n") for part in pieces[:-1])


def test_a_folder_labels_the_files_of_its_subfolders(tmp_path: Path) -> None:
    (tmp_path / "code" / "python").mkdir(parents=True)
    (tmp_path / "prose").mkdir()
    (tmp_path / "top.txt").write_text("top", encoding="utf-8")
    (tmp_path / "code" / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "code" / "python" / "b.txt").write_text("b", encoding="utf-8")
    (tmp_path / "prose" / "c.jsonl").write_text('{"text": "c"}\n{"text": "d", "label": "own"}\n', encoding="utf-8")
    (tmp_path / "prose" / "notes.md").write_text("not a corpus file", encoding="utf-8")
    found = {(d.text, d.label) for d in ms.Corpus.load(tmp_path)}
    assert found == {("top", None), ("a", "code"), ("b", "code/python"), ("c", "prose"), ("d", "own")}


def test_the_order_of_a_folder_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8")
    assert [d.text for d in ms.Corpus.load(tmp_path)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "head", "line"), [("a.jsonl", b"", b'{"text": "good"}\n'), ("a.csv", b"text\n", b"good\n")]
)
def test_a_file_is_read_no_further_than_it_is_asked(
    name: str, head: bytes, line: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    plain = Path.open

    def noting(self: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(plain(self, *args, **kwargs))
        return opened[-1]

    path = tmp_path / name
    path.write_bytes(head + line * 400_000)
    monkeypatch.setattr(Path, "open", noting)
    walk = iter(ms.Corpus.load(path))
    assert [next(walk).text for _ in range(500)] == ["good"] * 500
    (file,) = opened
    assert getattr(file, "buffer", file).raw.tell() < 1 << 18 < path.stat().st_size
    walk.close()
    assert file.closed


def test_a_dataset_is_consumed_one_record_at_a_time() -> None:
    taken: list[int] = []

    class Endless:
        features = None

        def __iter__(self) -> Iterator[dict[str, str]]:
            for number in range(10**9):
                taken.append(number)
                yield {"text": f"text {number}"}

    walk = iter(ms.Corpus.load(Endless()))
    assert [next(walk).text for _ in range(3)] == ["text 0", "text 1", "text 2"]
    assert len(taken) <= 4


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"not json", "line 3 is not JSON"),
        (b'{"text": "half', "line 3 is not JSON"),
        (b'{"n": ' + b"1" * 5000 + b', "text": "x"}', "line 3 is not JSON"),
        (b"[" * 100_000, "line 3 is not JSON"),
        (b'["text"]', "line 3 is a JSON list"),
        (b'{"body": "x"}', "line 3 has no text: its fields are 'body'"),
        (b"{}", "line 3 has no text: its fields are no fields"),
        (b'{"text": null}', "line 3 has no text"),
        (b'{"text": 5}', "line 3 has a int as text"),
        (b'{"text": ["a"]}', "line 3 has a list as text"),
        (b'{"text": ""}', "line 3 has an empty text"),
        (b'{"text": " \\n\\t"}', "line 3 has an empty text"),
        (b'{"text": "caf\xe9"}', "line 3 is not UTF-8"),
        (b'{"token_ids": []}', "line 3 has no token ids"),
        (b'{"token_ids": 5}', "line 3 has token ids that are not"),
        (b'{"token_ids": "12"}', "line 3 has token ids that are not"),
        (b'{"token_ids": [1, -2]}', "line 3 has token ids that are not"),
        (b'{"token_ids": [1.5]}', "line 3 has token ids that are not"),
        (b'{"token_ids": [true]}', "line 3 has token ids that are not"),
    ],
)
def test_a_bad_line_is_named_with_its_number_or_skipped_and_counted(line: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "four"}\nalso bad\n')
    with pytest.raises(ms.InputError, match=re.escape(problem)) as refused:
        ms.Corpus.load(path).facts()
    assert str(path) in str(refused.value)
    assert "--skip-bad-lines" in str(refused.value)
    assert refused.value.exit_code == 2
    lenient = ms.Corpus.load(path, skip_bad_lines=True)
    assert [d.text for d in lenient] == ["one", "four"]
    assert lenient.facts().documents == 2
    assert lenient.facts().skipped == 2
    assert problem in str(lenient.facts().first_skipped)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"text,label\nfine,a\ntoo,many,fields\n", "line 3 has more fields than the header"),
        (b"text,label\nfine,a\ncaf\xe9,b\n", "line 3 is not UTF-8"),
        (b"body,label\nfine,a\n", "line 2 has no text: its fields are 'body', 'label'"),
        (b"text,label\nfine,a\n,b\n", "line 3 has an empty text"),
    ],
)
def test_a_bad_csv_row_is_named_with_its_line(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_bytes(content)
    with pytest.raises(ms.InputError, match=re.escape(problem)):
        ms.Corpus.load(path).facts()


def test_a_csv_row_over_several_lines_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_bytes('\ufefftext,label\n"one\ntwo, ""three""",ä\n'.encode())
    assert [(d.text, d.label) for d in ms.Corpus.load(path)] == [('one\ntwo, "three"', "ä")]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"caf\xe9", "is not UTF-8"),
        ("a.txt", "hello".encode("utf-16"), "is not UTF-8"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b"  \n ", "has an empty text"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text,label\n", "is empty"),
        ("a.parquet", b"PAR1 not really", "is not a readable Parquet file"),
        ("a.parquet", b"", "is not a readable Parquet file"),
        ("a.pdf", b"%PDF", "cannot read"),
        ("a", b"text", "no ending"),
    ],
)
def test_a_file_that_gives_no_document_is_refused(name: str, content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ms.InputError, match=problem) as refused:
        ms.Corpus.load(tmp_path / name).facts()
    assert str(tmp_path / name) in str(refused.value)


def test_a_path_that_is_not_there_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ms.InputError, match="there is no corpus at"):
        ms.Corpus.load(tmp_path / "missing.jsonl")
    with pytest.raises(ms.InputError, match="holds no corpus files"):
        ms.Corpus.load(tmp_path)


@pytest.mark.parametrize("source", [None, 5, {"text": "a"}, (text for text in ["a"])])
def test_what_is_no_corpus_is_refused(source: Any) -> None:
    with pytest.raises(ms.InputError, match=f"this is not a corpus.*{type(source).__name__}"):
        ms.Corpus.load(source)


@pytest.mark.parametrize("source", [[], (), [""], [5], [None], [["nested"]]])
def test_a_list_without_a_single_text_is_refused(source: Any) -> None:
    with pytest.raises(ms.InputError, match=r"is empty|item 0"):
        ms.Corpus.load(source).facts()
    with pytest.raises(ms.InputError, match="is empty"):
        ms.Corpus.load(source, skip_bad_lines=True).facts()


def test_token_ids_need_as_many_labels_as_sequences() -> None:
    corpus = ms.Corpus.from_token_ids([[1, 2], [3]], labels=["x", "y"])
    assert [(d.token_ids, d.label, d.text) for d in corpus] == [((1, 2), "x", ""), ((3,), "y", "")]
    with pytest.raises(ms.InputError, match="every sequence needs a label"):
        ms.Corpus.from_token_ids([[1, 2], [3]], labels=["x"])


def test_the_fingerprint_knows_texts_labels_and_their_order() -> None:
    def fingerprint(*rows: Any) -> str:
        return ms.Corpus.load(list(rows)).facts().fingerprint

    one, two = {"text": "one", "label": "a"}, {"text": "two", "label": "a"}
    assert fingerprint(one, two) == fingerprint({**one, "source": "elsewhere", "page": 1}, two)
    different = [
        fingerprint(one, two),
        fingerprint(two, one),
        fingerprint(one),
        fingerprint(one, {**two, "label": "b"}),
        fingerprint(one, {"text": "two"}),
        fingerprint(one, {**two, "text": "two "}),
        fingerprint({"text": "onetwo", "label": "a"}),
        fingerprint({**one, "label": "None"}, two),
        fingerprint({"text": "one"}, two),
    ]
    assert len(set(different)) == len(different)
    ids = [ms.Corpus.from_token_ids(x).facts().fingerprint for x in ([[1, 2]], [[2, 1]], [[1], [2]], [[12]])]
    assert len(set(ids)) == 4


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec=None, categories=None), max_size=12))
def test_lone_surrogates_become_the_replacement_character_and_nothing_else_changes(text: str) -> None:
    pairs = re.sub(
        "[\ud800-\udbff][\udc00-\udfff]",
        lambda pair: chr(0x10000 + (ord(pair[0][0]) - 0xD800) * 0x400 + ord(pair[0][1]) - 0xDC00),
        text,
    )
    assert whole_characters(text) == re.sub("[\ud800-\udfff]", "\ufffd", pairs)


@pytest.mark.parametrize("field", ["text", "label", "source", "note"])
def test_a_lone_surrogate_anywhere_in_a_record_does_not_end_the_run(field: str, demo_model: Any, store: Any) -> None:
    """`"\\ud800"` is legal JSON; neither a tokenizer nor DuckDB can take it."""
    row = {"text": "A text.", "label": "a", "source": "s", "note": "n"}
    row[field] += "\ud800 x"
    run = ms.record(demo_model, ["A first text.", row], store, name="run", batch_size=1, progress=False)
    assert run.status == "complete"
    columns = {"note": "metadata"}.get(field, field)
    ((value,),) = store.fetch(f"SELECT CAST({columns} AS VARCHAR) FROM sequences WHERE sequence_id = 1")
    assert "\ufffd x" in value or "\\ufffd x" in value


def test_text_with_every_control_character_is_stored_as_it_is(demo_model: Any, store: Any) -> None:
    text = "".join(map(chr, range(32))) + "\x7f\x85\u2028\ufeff end"
    ms.record(demo_model, [text], store, name="run", progress=False)
    assert store.fetch("SELECT text FROM sequences") == [(text,)]


def test_skipped_records_are_said_in_the_runs_summary(demo_model: Any, store: Any, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one"}\nbad\n{"text": "two"}\n[]\n', encoding="utf-8")
    run = ms.record(
        demo_model, ms.Corpus.load(path, skip_bad_lines=True), store, name="run", batch_size=1, progress=False
    )
    assert run.status == "complete"
    assert store.fetch("SELECT document_id, text FROM sequences ORDER BY ALL") == [(0, "one"), (1, "two")]
    assert run.info["summary"]["skipped_records"] == 2
    assert "line 2 is not JSON" in run.info["summary"]["first_skipped"]
