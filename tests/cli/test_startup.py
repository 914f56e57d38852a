"""What starting the command line loads, and how it can be started."""

from __future__ import annotations

import subprocess
import sys

from moescope.cli.app import app
from moescope.cli.parser import commands, groups

_HELP = """
import sys
from contextlib import redirect_stdout
from io import StringIO
from moescope.cli.app import run
for words in [line.split() for line in sys.stdin.read().splitlines()]:
    sys.argv = ["moescope", *words, "--help"]
    with redirect_stdout(StringIO()) as said:
        assert run() == 0, words
    assert "Usage: moescope" in said.getvalue(), words
heavy = {"torch", "transformers", "dash", "pandas", "numpy", "scipy", "numba", "plotly", "pyarrow", "duckdb", "yaml"}
print(sorted(heavy & set(sys.modules)))
"""


def test_help_of_every_command_loads_nothing_heavy() -> None:
    asked = ["", *groups(app), *(each.name for each in commands(app))]
    done = subprocess.run(
        [sys.executable, "-c", _HELP], input="\n".join(asked), capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout == "[]\n"


def test_the_module_runs_as_the_program_does() -> None:
    done = subprocess.run([sys.executable, "-m", "moescope", "--version"], capture_output=True, text=True, check=True)
    from moescope.core.versions import VERSION

    assert done.stdout == f"{VERSION}\n"
    refused = subprocess.run([sys.executable, "-m", "moescope", "profile"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "moescope profile" in refused.stderr
    assert "__main__" not in refused.stderr
