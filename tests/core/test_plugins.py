"""Packages of others: what their entry points name is in the registries, and one that fails is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ANALYSIS = '''
import pyarrow as pa
from moescope.core.analysis import analysis
from moescope.core.result import Result

@analysis(name="answer_of_others", source="nobody")
def answer_of_others(run):
    """What is the answer?"""
    return Result(title="42", table=pa.table({"value": [42]}), definition="known", units={}, n=1, n_unit="answer")
'''


def _installed(folder: Path, code: str) -> None:
    """A package as pip leaves it: a module, and metadata with an entry point."""
    (folder / "others_pack.py").write_text(code)
    facts = folder / "others_pack-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: others-pack\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[moescope]\nothers = others_pack\n")


def _analyses(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moescope", "analyze", "--list", "--json"]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(folder)}, cwd=folder
    )


def test_an_analysis_of_an_installed_package_is_listed_by_the_command(tmp_path: Path) -> None:
    _installed(tmp_path, ANALYSIS)
    done = _analyses(tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"answer_of_others"' in done.stdout


def test_a_package_that_cannot_be_imported_is_named_without_a_traceback(tmp_path: Path) -> None:
    _installed(tmp_path, "raise OSError('no such disk')")
    done = _analyses(tmp_path)
    assert done.returncode == 2
    told = " ".join(done.stderr.split())
    assert "others-pack" in told
    assert "no such disk" in told
    assert "Traceback" not in told
