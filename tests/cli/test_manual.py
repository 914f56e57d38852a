"""The manual and the examples against the parser that they tell of."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from moescope.cli.app import app
from moescope.cli.manual import man_page, markdown_page
from moescope.cli.parser import Described, commands, groups
from tests.cli.conftest import Cli

ROOT = Path(__file__).parents[2]
ALL = list(commands(app))
EXAMPLES = [(each.name, example) for each in ALL for example in each.examples]
QUICK = ("plan", "runs list", "intervene edits", "doctor", "profile", "manual", "analyze")


def test_the_page_of_commands_is_what_the_commands_say() -> None:
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == markdown_page(app), "write it again: moescope manual > docs/cli.md"


def test_the_man_page_is_what_the_commands_say() -> None:
    written = (ROOT / "docs" / "moescope.1").read_text(encoding="utf-8")
    assert written == man_page(app), "write it again: moescope manual --format man > docs/moescope.1"


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff to read it")
def test_the_man_page_reads_without_a_warning() -> None:
    read = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-K", "utf-8"], input=man_page(app).encode(), capture_output=True, check=True
    )
    assert read.stderr == b""
    shown = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", read.stdout.decode()).replace("‐", "-").replace("−", "-")
    assert "--batch-size" in shown
    assert "moescope profile demo --store runs.duckdb --name base" in " ".join(shown.split())


@pytest.mark.parametrize("each", ALL, ids=lambda each: each.name)
def test_every_command_and_flag_says_what_it_is(each: Described) -> None:
    assert each.examples, f"{each.name} shows no example"
    assert each.summary.endswith(".")
    for flag in each.flags:
        where = f"{each.name} --{flag.name}"
        assert flag.help.endswith((".", "…")), f"{where} says nothing whole: {flag.help!r}"
        assert "[" not in flag.help, f"{where}: the terminal swallows text in brackets"
        if flag.default is None and not flag.required:
            assert isinstance(flag.source.show_default, str) or flag.takes() == "path", (
                f"{where} does not say its default"
            )
        if flag.kind is int and flag.name != "seed":
            assert flag.least is not None, f"{where} does not say its range"


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=lambda text: text)
def test_every_example_parses(name: str, example: str, cli: Cli) -> None:
    words = shlex.split(example)
    assert words[0] == "moescope"
    assert " ".join(words[1:]).startswith(name)
    outcome = cli(*words[1:], "--show-config")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"# moescope {name}\n")


def test_every_group_shows_an_example() -> None:
    for name, text in groups(app).items():
        found = re.findall(r"Example: moescope (.*)", text)
        assert found, f"{name} shows no example"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "example"), [pair for pair in EXAMPLES if pair[0] in QUICK], ids=lambda text: text)
def test_quick_examples_run(name: str, example: str, cli: Cli) -> None:
    if name in ("runs list", "analyze"):
        assert cli("profile", "demo", "--name", "base").code == 0
    outcome = cli(*shlex.split(example)[1:])
    assert outcome.code == 0, outcome.err


def test_the_file_of_the_manual_is_read(cli: Cli) -> None:
    page = markdown_page(app)
    for text in re.findall(r"```yaml\n(# (\w+\.yaml)\n.*?)```", page, re.DOTALL):
        Path(text[1]).write_text(text[0], encoding="utf-8")
    block = re.search(r"```console\n(.*?)```", page, re.DOTALL)
    assert block is not None
    for line in block[1].splitlines():
        words = shlex.split(line.removeprefix("$ "))[1:]
        assert cli(*words, *(() if "--show-config" in words else ("--show-config",))).code == 0
    for command in ("profile", "analyze", "intervene effect"):
        assert cli(*command.split(), "--config", "both.yaml", "--show-config").code == 0
