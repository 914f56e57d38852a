"""What is published: a source distribution that a wheel can be built from, and that wheel, tried as a stranger would."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

_CONSUMER = '''
import moescope as ms


def busiest(path: str) -> list[tuple[int, int]]:
    """Layer and expert, most tokens first."""
    with ms.Store(path, read_only=True) as store:
        run: ms.Run = store.runs()[0]
        result: ms.Result = ms.analyze(run, "load")
        frame = result.df()
        return [(int(layer), int(expert)) for layer, expert in zip(frame["layer"], frame["expert"], strict=True)]


def without(experts: list[int], layer: int) -> ms.Intervention:
    """A cut."""
    return ms.Intervention([ms.edits.Ablate(layer=layer, experts=experts, how="route_around")], name="cut")


cut: ms.Intervention = without([5, 9], 3)
problem: ms.MoescopeError = ms.InputError("nothing", fix="something")
'''
_WRONG = 'import moescope as ms\n\nms.Intervention([], name=3)\nms.no_such_name\nstore: int = ms.Store("a.duckdb")\n'


def _run(*command: object, cwd: Path, timeout: int = 900, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}
    words = list(map(str, command))
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution of a copy of the checkout, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("release")
    leave = shutil.ignore_patterns(".*", "build", "dist", "demo-*", "*.egg-info", "__pycache__", "*.duckdb", "results")
    shutil.copytree(ROOT, folder / "checkout", ignore=leave)
    shutil.rmtree(folder / "checkout" / "demo", ignore_errors=True)
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "out")
    done = _run(*build, folder / "checkout", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def source(built: Path) -> set[str]:
    """Names in the source distribution, without its own folder."""
    (found,) = built.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def test_the_source_distribution_holds_what_is_needed_to_read_test_and_document_it(source: set[str]) -> None:
    for name in (
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "constraints.txt",
        "pyproject.toml",
    ):
        assert name in source
    for folder in ("tests", "docs", "benchmarks", "store", "probes", "routing", "sae", "dashboard", "moescope"):
        files = [
            path
            for path in (ROOT / folder).rglob("*.py")
            if "__pycache__" not in path.parts and "_build" not in path.parts
        ]
        missing = {path.relative_to(ROOT).as_posix() for path in files} - source
        assert not {name for name in missing if "/results/" not in name}
    assert not [name for name in source if name.endswith((".pyc", ".duckdb")) or "/_build/" in name]


def test_a_wheel_from_the_source_distribution_holds_the_package_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(about))
    manual = {name for name in names if name.split("/")[0].endswith(".data")}
    assert {name.split("/", 1)[1] for name in manual} == {"data/share/man/man1/moescope.1"}
    inside = {name for name in names if not name.split("/")[0].endswith(".dist-info")} - manual
    assert {name.split("/")[0] for name in inside} == {"moescope"}
    expected = {
        f"moescope/{path.relative_to(ROOT / 'moescope' if folder == 'moescope' else ROOT).as_posix()}"
        for folder in ("moescope", "store", "probes", "routing", "sae", "dashboard")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in inside if name.endswith(".py")} == expected
    assert "moescope/py.typed" in inside
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone in a folder of its own, beside the libraries of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    done = _run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_program_that_uses_it_passes_the_strict_type_checker(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "consumer.py").write_text(_CONSUMER)
    (tmp_path / "wrong.py").write_text(_WRONG)
    check = (sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", tmp_path / "cache")
    done = _run(*check, "--follow-imports=silent", "consumer.py", cwd=tmp_path, MYPYPATH=str(installed))
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = _run(*check, "--follow-imports=silent", "wrong.py", cwd=tmp_path, MYPYPATH=str(installed))
    assert wrong.returncode == 1, "types are not seen: what is wrong passes too"
    assert wrong.stdout.count("error:") == 3, wrong.stdout


def test_in_an_environment_of_its_own_with_base_dependencies_the_demo_is_profiled(wheel: Path, tmp_path: Path) -> None:
    """Installs some two gigabytes from the registry that pip is set to; skipped where it gives nothing."""
    made = _run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    bin_ = tmp_path / "venv" / "bin"
    pip = (
        bin_ / "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--constraint",
        ROOT / "constraints.txt",
        wheel,
    )
    done = _run(*pip, cwd=tmp_path, timeout=1800)
    if done.returncode and ("No matching distribution" in done.stderr or "Connection" in done.stderr):
        pytest.skip("no registry gives the dependencies here: " + done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    listed = _run(bin_ / "pip", "--disable-pip-version-check", "list", "--format=freeze", cwd=tmp_path).stdout.lower()
    assert not [name for name in ("dash==", "ray==", "sae-lens==", "polars==", "nnsight==") if f"\n{name}" in listed]
    assert _run(bin_ / "python", "-c", "import moescope; moescope.Store; moescope.record", cwd=tmp_path).returncode == 0
    assert _run(bin_ / "moescope", "--help", cwd=tmp_path).returncode == 0
    profiled = _run(
        bin_ / "moescope",
        "profile",
        "demo",
        "--store",
        "runs.duckdb",
        "--report",
        "report.html",
        cwd=tmp_path,
        timeout=1800,
    )
    assert profiled.returncode == 0, profiled.stderr
    assert (tmp_path / "report.html").stat().st_size > 100_000
    refused = _run(bin_ / "moescope", "dashboard", "runs.duckdb", cwd=tmp_path)
    assert refused.returncode == 2
    assert "pip install 'moescope[dashboard]'" in refused.stderr
