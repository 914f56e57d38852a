"""Every code block of README and docs runs as it stands, or says why not."""

from __future__ import annotations

import contextlib
import glob
import io
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

# Blocks that are not run, in all: a reader should be able to run nearly everything.
MOST_NOT_RUN = 40
# Run by tests of their own, with the records that all of them share made once.
ELSEWHERE = "docs/methods/"
REFUSED: Any = typer.BadParameter.__base__  # what the parser raises for a wrong flag or a missing argument
_SHELL = re.compile(r"[|<>;&$`]")


def _apart(page: Path, documented: ModuleType) -> bool:
    return str(page.relative_to(documented.ROOT)).startswith(ELSEWHERE)


def test_every_block_is_tagged(page: Path, documented: ModuleType) -> None:
    assert not [block.where for block in documented.blocks(page) if not block.kind]


def test_every_console_block_has_commands(page: Path, documented: ModuleType) -> None:
    for block in documented.blocks(page):
        if block.kind == "console":
            assert block.commands, block.where


def test_what_is_not_run_is_little_and_says_why(documented: ModuleType) -> None:
    found = [b for page in documented.written_pages() for b in documented.blocks(page) if b.kind in documented.RUN]
    left = {block.where: block.reason for block in found if block.reason is not None}
    listed = "\n".join(f"{where}: {reason}" for where, reason in left.items())
    assert all(len(reason.split()) >= 2 for reason in left.values()), listed
    assert len(left) <= MOST_NOT_RUN, listed
    assert len(found) > len(left)


def _parsed(words: list[str]) -> None:
    """Hand a command to the real parser, without running it."""
    from moescope.cli.app import app

    command: Any = typer.main.get_command(app)
    context = command.make_context("moescope", list(words))
    while hasattr(command, "resolve_command") and context._protected_args + context.args:
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


def test_every_command_is_one_that_the_command_line_takes(
    page: Path, documented: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in documented.blocks(page):
        if block.kind != "console":
            continue
        for command in block.commands:
            words = documented.words_of(command)
            if not words or words[0] != "moescope" or _SHELL.search(command.split(" #")[0]) or "--help" in words:
                continue
            if "--config" in words:  # the file holds what the command leaves out
                continue
            try:
                _parsed(words[1:])
            except typer.Exit:
                continue  # --version and the like
            except REFUSED as refused:
                pytest.fail(f"{block.where}: {command}\n{refused.format_message()}")


def test_a_wrong_flag_would_be_found() -> None:
    with pytest.raises(REFUSED):
        _parsed(["profile", "demo", "--no-such-flag"])
    with pytest.raises(REFUSED):
        _parsed(["runs", "lisst", "runs.duckdb"])


def _python(block: Any, names: dict[str, Any]) -> None:
    """Run a block in the page's names; a failure tells the page and the line."""
    source = "\n" * (block.line - 1) + block.code
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(source, str(block.page), "exec"), names)


def _console(block: Any, words_of: Any, demo_model: Any) -> None:
    from moescope.cli.app import run

    for command in block.commands:
        words = words_of(command)
        if not words:
            continue
        if words[0] != "moescope" or _SHELL.search(command.split(" #")[0]):
            path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
            done = subprocess.run(
                ["bash", "-c", command],
                capture_output=True,
                text=True,
                check=False,
                env={"PATH": path, "HF_HUB_OFFLINE": "1"},
            )
            assert done.returncode == 0, f"{block.where}: {command}\n{done.stdout}\n{done.stderr}"
            continue
        words = [name for word in words for name in (sorted(glob.glob(word)) or [word] if "*" in word else [word])]
        said, told = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(told),
        ):
            _model_in_memory(patch, demo_model)
            patch.setattr(sys, "argv", words)
            code = run()
        assert code == 0, f"{block.where}: {command}\n{said.getvalue()[-2000:]}\n{told.getvalue()[-2000:]}"


def _model_in_memory(patch: pytest.MonkeyPatch, demo_model: Any) -> None:
    """Loading "demo" with default options gives the model already loaded: the page's other commands do not pay for it."""
    import moescope.probes.loading as loading

    plain = loading.load
    default = {"device": "auto", "dtype": "auto", "revision": None, "trust_remote_code": False}

    def load(model: Any, **options: Any) -> Any:
        return demo_model if model == "demo" and options == default else plain(model, **options)

    patch.setattr(loading, "load", load)


@pytest.mark.slow
def test_blocks_run_from_top_to_bottom(
    page: Path, documented: ModuleType, workplace: Path, demo_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if _apart(page, documented):
        pytest.skip("the method pages have tests of their own")
    import moescope.probes.demo as demo

    chosen = [block for block in documented.blocks(page) if block.kind in documented.RUN and block.reason is None]
    if not chosen:
        pytest.skip("nothing to run")
    text = page.read_text(encoding="utf-8")
    if "<!-- begins without a store -->" in text:
        (workplace / "runs.duckdb").unlink()
    if "<!-- on the whole bundled corpus -->" in text:
        monkeypatch.setattr(demo, "CORPUS_PATH", Path(demo.__file__).parent / "corpus.jsonl")
    names: dict[str, Any] = {"__name__": "__main__"}
    monkeypatch.setenv("MOESCOPE_DEBUG", "")
    for block in chosen:
        if block.kind == "python":
            _python(block, names)
        else:
            _console(block, documented.words_of, demo_model)
