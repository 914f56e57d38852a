"""Bad input: exit code 2, one clear line on stderr, nothing on stdout, no traceback, and no store made."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from moescope.store.store import Store

Cli = Callable[..., Any]


@pytest.fixture
def profile(cli: Cli, corpus: Path, tmp_path: Path, demo_loaded: None) -> Iterator[Cli]:
    """`moescope profile` of three texts, which must leave nothing behind that was not there before."""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    store = tmp_path / "runs.duckdb"

    def call(model: str = "demo", *options: object, data: object = corpus, store: Path = store) -> Any:
        return cli("profile", model, "--data", data, "--store", store, *options)

    yield call
    assert not store.exists(), "a store was made"
    for path, content in before.items():
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "one"}\nnot json\n', ["a.jsonl, line 2", "is not JSON"]),
        ("a.jsonl", b'{"text": "one"}\n\n["two"]\n', ["a.jsonl, line 3", "not an object"]),
        ("a.jsonl", b'{"body": "one", "title": "t"}\n', ["line 1", "has no text", "'body'", "'title'"]),
        ("a.jsonl", b'{"text": "one"}\n{"text": 2}\n', ["line 2", "int"]),
        ("a.jsonl", b'{"text": "one"}\n{"text": "  "}\n', ["line 2", "empty text"]),
        ("a.jsonl", b'{"text": "one"}\n{"text": "caf\xe9"}\n', ["line 2", "UTF-8"]),
        ("a.jsonl", b"", ["is empty"]),
        ("a.jsonl", b"\n\n", ["is empty"]),
        ("a.txt", b"", ["is empty"]),
        ("a.csv", b"text,label\n", ["is empty"]),
        ("a.csv", b"body,label\nx,y\n", ["line 2", "has no text"]),
        ("a.parquet", b"PAR1 not really", ["not a readable Parquet file"]),
        ("a.xml", b"<text/>", [".xml", ".jsonl"]),
    ],
)
def test_corpus_that_cannot_be_read_is_refused_with_its_place(
    profile: Cli, tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    profile(data=tmp_path / name).assert_refused(*words)


def test_missing_corpus_is_refused(profile: Cli, tmp_path: Path) -> None:
    profile(data=tmp_path / "no.jsonl").assert_refused("there is no corpus at", "no.jsonl")


def test_folder_without_corpus_files_is_refused(profile: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    profile(data=tmp_path / "empty").assert_refused("holds no corpus files", ".jsonl")


@pytest.mark.parametrize("model", ["./no/such/model", "/no/such/model", "model.bin", "no.gguf", "[/red]", "a b c", ""])
def test_unknown_model_is_refused(profile: Cli, model: str) -> None:
    profile(model).assert_refused(model)


def test_unknown_model_that_could_be_on_the_hub_is_refused(profile: Cli) -> None:
    profile("moescope-tests/no-such-model").assert_refused("moescope-tests/no-such-model")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["is not a model folder", "config.json"]),
        ({"config.json": "{}"}, ["has no weights", "safetensors"]),
        ({"config.json": "{}", "pytorch_model.bin": "x"}, ["never loads", "convert them to safetensors"]),
        ({"config.json": "not json", "model.safetensors": "x"}, []),
        ({"config.json": '{"model_type": "qwen3_moe"}', "model.safetensors": "not safetensors"}, []),
        ({"config.json": '{"model_type": "no_such_family"}', "model.safetensors": "x"}, ["causal language model"]),
    ],
    ids=["empty", "no weights", "pickled", "broken config", "broken weights", "unknown family"],
)
def test_folder_that_is_no_model_is_refused(
    profile: Cli, tmp_path: Path, files: dict[str, str], words: list[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    profile(str(folder)).assert_refused(str(folder), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--probe", "rooting"], ["no probe called 'rooting'", "did you mean 'routing'"]),
        (["--probe", "tokens,,routing"], ["probe"]),
        (["--device", "warp"], ["no device 'warp'", "auto"]),
        (["--device", "cuda:99"], ["no device 'cuda:99'"]),
        (["--dtype", "int3"], ["'int3'", "bfloat16"]),
        (["--name", ""], ["needs a name"]),
        (["--name", "   "], ["needs a name"]),
        (["--report", "report.pdf"], ["ending in .html", "report.pdf"]),
        (["--report", "no/such/report.html"], ["no such folder", "mkdir -p no/such"]),
        (["--text-field", "body"], ["has no text", "'body'"]),
    ],
)
def test_option_that_cannot_be_is_refused(profile: Cli, options: list[str], words: list[str]) -> None:
    profile("demo", *options).assert_refused(*words)


def test_report_under_the_name_of_a_folder_is_refused_before_the_run(profile: Cli, tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    profile("demo", "--report", "report.html").assert_refused("report.html")


@pytest.mark.parametrize(
    ("options", "option"),
    [
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "-3"], "--batch-size"),
        (["--batch-size", "many"], "--batch-size"),
        (["--max-length", "1"], "--max-length"),
        (["--seed", "x"], "--seed"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_wrong_usage_names_the_option(profile: Cli, options: list[str], option: str) -> None:
    outcome = profile("demo", *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert option in outcome.err
    assert "Traceback" not in outcome.err
    assert "moescope profile --help" in outcome.err


@pytest.mark.parametrize("arguments", [["no-such-command"], ["profile"], ["runs", "a", "b"]])
def test_wrong_command_is_bad_usage(cli: Cli, arguments: list[str]) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert "--help" in outcome.err
    assert "Traceback" not in outcome.err


def test_store_in_a_missing_folder_is_refused(profile: Cli, tmp_path: Path) -> None:
    profile(store=tmp_path / "no" / "runs.duckdb").assert_refused("no such folder", "mkdir -p")
    assert not (tmp_path / "no").exists()


def test_folder_as_store_is_refused(profile: Cli, tmp_path: Path) -> None:
    profile(store=tmp_path).assert_refused("is a folder")


@pytest.mark.parametrize("command", ["profile", "runs", "dashboard"])
def test_text_file_as_store_is_refused_and_left_as_it_is(cli: Cli, corpus: Path, tmp_path: Path, command: str) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("do not lose me\n" * 50)
    arguments = ["demo", "--data", corpus, "--store", notes] if command == "profile" else [notes]
    cli(command, *arguments).assert_refused("is not a store", "left as it is")
    assert notes.read_text() == "do not lose me\n" * 50


@pytest.mark.parametrize("command", ["profile", "runs", "dashboard"])
def test_duckdb_file_of_another_program_is_refused_and_left_as_it_is(
    cli: Cli, corpus: Path, tmp_path: Path, command: str
) -> None:
    path = tmp_path / "sales.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE customers (id INTEGER)")
    before = path.read_bytes()
    arguments = ["demo", "--data", corpus, "--store", path] if command == "profile" else [path]
    cli(command, *arguments).assert_refused("belongs to another program", "customers")
    assert path.read_bytes() == before


@pytest.mark.parametrize("command", ["profile", "runs", "dashboard"])
def test_store_held_by_another_process_is_refused_with_its_pid(
    cli: Cli, corpus: Path, tmp_path: Path, command: str
) -> None:
    path = tmp_path / "held.duckdb"
    Store(path).close()
    hold = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        arguments = ["demo", "--data", corpus, "--store", path] if command == "profile" else [path]
        cli(command, *arguments).assert_refused("is in use", str(process.pid))
    finally:
        process.communicate("")


@pytest.mark.parametrize("name", ["base", "[/red]", "ünï 'quoted'", "\u202egnp"])
def test_taken_name_is_refused_and_the_store_is_left_as_it_is(
    cli: Cli, corpus: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "taken.duckdb"
    with Store(path) as store:
        store.begin_run(name=name)
        store.connection.execute("UPDATE runs SET status = 'complete'")
    outcome = cli("profile", "demo", "--data", corpus, "--store", path, "--name", name)
    outcome.assert_refused("already has a run called", "--name")
    assert "\u202e" not in outcome.err
    with Store(path, read_only=True) as store:
        assert [(run.name, run.status) for run in store.runs()] == [(name, "complete")]


@pytest.mark.parametrize("command", ["runs", "dashboard"])
def test_missing_store_is_refused_and_not_made(cli: Cli, tmp_path: Path, command: str) -> None:
    cli(command, tmp_path / "no.duckdb").assert_refused("there is no store at", "moescope profile")
    assert not (tmp_path / "no.duckdb").exists()


def test_damaged_store_is_refused(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "half.duckdb"
    Store(path).close()
    path.write_bytes(path.read_bytes()[:-5000])
    outcome = cli("runs", path)
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert "internal error" not in outcome.err


def test_name_that_is_no_text_is_refused(profile: Cli) -> None:
    """What a shell hands over for bytes that are no UTF-8."""
    profile("demo", "--name", "caf\udce9").assert_refused("name")
