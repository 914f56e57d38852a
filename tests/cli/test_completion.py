"""What Tab offers, asked as bash and zsh ask."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest
import typer

from moescope.cli import completion
from moescope.core.analysis import analyses
from moescope.core.edit import edits
from moescope.core.probe import probes
from moescope.store import schema
from moescope.store.store import Store
from tests.cli.conftest import Cli

Tab = Callable[..., list[str]]
RUNS = "SELECT name, model || ', ' || status FROM runs ORDER BY name"


def _typed(store: Path) -> typer.Context:
    from typer.core import TyperCommand

    context = typer.Context(TyperCommand("analyze"))
    context.params = {"store": store}
    return context


@pytest.fixture
def tab(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Tab:
    """`tab("analyze", "runs.duckdb", "--run", "")` gives what bash is told for the last word."""

    def ask(*words: str) -> list[str]:
        monkeypatch.setenv("_MOESCOPE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["moescope", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        outcome = cli()
        assert outcome.code == 0, outcome.err
        assert outcome.err == ""
        return [line for line in outcome.out.split("\n") if line]

    return ask


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of two runs and an autoencoder."""
    path = tmp_path / "mine.duckdb"
    with Store(path) as made:
        for name in ("base", "cut"):
            made.begin_run(name=name, model="demo")
    with duckdb.connect(str(path)) as made:
        made.execute("UPDATE runs SET status = 'complete'")
        made.execute(
            "INSERT INTO saes BY NAME SELECT uuid() AS sae_id, 'topk-16' AS name, 'topk' AS architecture, "
            "'blocks.3.hook_mlp_out' AS site, 64 AS d_in, 16 AS d_sae, now() AS created_at"
        )
    return path


def test_commands_and_flags_are_offered(tab: Tab) -> None:
    assert set(tab("pro")) == {"profile"}
    assert {"train", "judge", "study"} <= set(tab("sae", ""))
    assert "--batch-size" in tab("profile", "demo", "--ba")


def test_runs_of_the_store_that_is_typed_are_offered(tab: Tab, store: Path) -> None:
    before = store.read_bytes()
    assert tab("analyze", str(store), "--run", "") == ["base", "cut"]
    assert tab("analyze", str(store), "--run", "c") == ["cut"]
    assert tab("runs", "delete", "--store", str(store), "b") == ["base"]
    assert tab("sae", "judge", "--store", str(store), "--sae", "") == ["topk-16"]
    store.rename(store.with_name("runs.duckdb"))
    assert tab("export", "runs.duckdb", "out", "--run", "") == ["base", "cut"]
    assert Path("runs.duckdb").read_bytes() == before
    assert list(Path.cwd().iterdir()) == [Path.cwd() / "runs.duckdb"]


def test_a_store_that_cannot_be_read_offers_nothing(tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "text.duckdb").write_text("no store", encoding="utf-8")
    for name in ("none.duckdb", "text.duckdb", "."):
        assert tab("analyze", name, "--run", "") == []
    with duckdb.connect("empty.duckdb"):
        pass
    assert tab("analyze", "empty.duckdb", "--run", "") == []
    assert not (tmp_path / "none.duckdb").exists()


@pytest.mark.parametrize(
    "name",
    ["$(touch ran)", "`touch ran`", "a;touch ran", "a b", "a\nb", "\x1b[2J", "a'b", 'a"b', "a|b", "--yes", "a*", "~"],
)
def test_names_that_a_shell_would_not_take_as_they_stand_are_left_out(tab: Tab, store: Path, name: str) -> None:
    with duckdb.connect(str(store)) as made:
        made.execute("UPDATE runs SET name = ? WHERE name = 'cut'", [name])
        made.execute("UPDATE runs SET model = '$(touch ran)`touch ran`\x1b[2J'")
    assert tab("analyze", str(store), "--run", "") == ["base"]
    assert all(set(said) <= set("touch ran2Jcomplete, ") for _, said in completion._from_store(_typed(store), "", RUNS))


def test_chosen_by_bash_no_name_of_a_store_runs(store: Path, tmp_path: Path) -> None:
    """The script that bash is given, on a run that another person has named."""
    with duckdb.connect(str(store)) as made:
        made.execute("UPDATE runs SET name = '$(touch ran)' WHERE name = 'cut'")
    program = str(Path(sys.executable).parent / "moescope")
    env = os.environ | {"PATH": f"{Path(program).parent}:{os.environ['PATH']}"}
    script = (
        f'eval "$(_MOESCOPE_COMPLETE=source_bash {program})"; COMP_WORDS=(moescope analyze {store} --run ""); COMP_CWORD=4; '
        "$(complete -p moescope | sed 's/.*-F \\([^ ]*\\).*/\\1/') moescope; eval \"true ${COMPREPLY[*]}\"; echo ${COMPREPLY[*]}"
    )
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["base"]
    assert not (tmp_path / "ran").exists()


def test_a_store_from_elsewhere_reads_no_other_file(tab: Tab, store: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("hushhush", encoding="utf-8")
    with duckdb.connect(str(store)) as made:
        made.execute("ALTER TABLE saes RENAME TO saes_before")
        made.execute(
            f"CREATE VIEW saes AS SELECT content AS name, '' AS architecture, '' AS site FROM read_text('{secret}')"
        )
    assert tab("sae", "judge", "--store", str(store), "--sae", "") == []


def test_a_store_that_another_program_writes_offers_nothing(tab: Tab, store: Path) -> None:
    hold = "import duckdb, sys; held = duckdb.connect(sys.argv[1]); print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"1\n"
        assert tab("analyze", str(store), "--run", "") == []


def test_names_are_those_of_the_registries(tab: Tab) -> None:
    assert set(tab("analyze", "x.duckdb", "--analysis", "")) == {entry.name for entry in analyses}
    assert set(tab("profile", "demo", "--probe", "")) == {entry.name for entry in probes}
    assert set(tab("intervene", "effect", "demo", "--edit", "")) == {kind.kind for kind in edits}
    assert set(tab("export", "x.duckdb", "out", "--tables", "")) == {table.name for table in schema.TABLES}


def test_the_last_of_several_names_is_completed(tab: Tab) -> None:
    assert tab("profile", "demo", "--probe", "tokens,rou") == ["tokens,router_logits", "tokens,routing"]


def test_parameters_are_those_of_the_analysis_that_is_typed(tab: Tab) -> None:
    offered = tab("analyze", "x.duckdb", "--analysis", "local_consistency", "--param", "")
    assert offered == [f"{name}=" for name in analyses["local_consistency"].parameters]
    assert "segment=" in offered
    assert tab("analyze", "x.duckdb", "--analysis", "local_consistency", "--param", "segment=") == ["segment="]
    assert tab("analyze", "x.duckdb", "--param", "") == []


def test_parameters_of_every_analysis_are_read_rightly() -> None:
    read = {name: parameters for name, (_, parameters) in completion._analyses().items()}
    assert read == {entry.name: tuple(entry.parameters) for entry in analyses}


def test_zsh_is_told_what_each_name_is(cli: Cli, monkeypatch: pytest.MonkeyPatch, store: Path) -> None:
    monkeypatch.setenv("_MOESCOPE_COMPLETE", "complete_zsh")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", f"moescope analyze {store} --run b")
    told = cli().out
    assert '"base":"demo, complete"' in told.replace("\\", "")
    assert "cut" not in told


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_for_shells_are_printed(shell: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_MOESCOPE_COMPLETE", f"source_{shell}")
    assert "_MOESCOPE_COMPLETE" in cli().out


def test_nothing_heavy_is_loaded_for_a_name(store: Path) -> None:
    program = """
import sys
from moescope.cli.app import run
assert run() == 0
print(sorted({"torch", "transformers", "dash", "pandas", "plotly", "scipy", "numba"} & set(sys.modules)))
"""
    words = ["moescope", "analyze", str(store), "--run", "base", "--analysis", "lo"]
    env = {"_MOESCOPE_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "load" in done.stdout.splitlines()
