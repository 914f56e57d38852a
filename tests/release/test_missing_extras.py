"""What needs an extra that is not installed says which, in one line, and leaves with 2; everything else works without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Modules of every extra; None in `sys.modules` is to Python what is not installed.
EXTRAS = ("dash", "flask", "brotli", "dash_ag_grid", "dash_mantine_components", "datasets", "transformer_lens", "nnsight", "sae_lens",
          "ray", "polars", "kaleido")  # fmt: skip
_WITHOUT = f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS!r}))\n"
_COMMANDS = """
import contextlib, io, json, os
from moescope.cli.app import run
told = {}
for name, words in json.loads(sys.argv[1]).items():
    sys.argv = ["moescope", *words]
    out, err = io.StringIO(), io.StringIO()
    before = set(os.listdir())
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run()
    told[name] = [code, out.getvalue(), err.getvalue(), sorted(set(os.listdir()) - before)]
print(json.dumps(told))
"""
_ASKED = {
    "dashboard": ["dashboard", "runs.duckdb"],
    "ray": ["profile", "demo", "--data", "texts.jsonl", "--store", "new.duckdb", "--workers", "2"],
    "sae": ["sae", "study", "demo", "--data", "texts.jsonl", "--store", "new.duckdb", "--site", "blocks.3.hook_mlp_out",
            "--spec", "topk:d=8,k=2"],
    "images": ["analyze", "runs.duckdb", "--analysis", "load", "--allow-incomplete", "--output", "load.png"],
}  # fmt: skip


def _without_extras(code: str, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _WITHOUT + code, *arguments]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run and a corpus."""
    import moescope as ms

    made = tmp_path_factory.mktemp("without")
    (made / "texts.jsonl").write_text('{"text": "one two three"}\n')
    with ms.Store(made / "runs.duckdb") as store:
        run = store.begin_run(name="base")
        store.connection.execute("INSERT INTO loads VALUES (?, 0, 'mlp', NULL, 'prefill', 0, 5, 1.0)", [run.run_id])
    return made


@pytest.fixture(scope="module")
def told(folder: Path) -> Any:
    """What each command says where no extra is installed: its code, stdout, stderr and the files it made."""
    return json.loads(_without_extras(_COMMANDS, folder, json.dumps(_ASKED)).splitlines()[-1])


@pytest.mark.parametrize("extra", _ASKED)
def test_a_command_names_the_extra_it_needs_in_one_line(told: Any, extra: str) -> None:
    code, out, err, made = told[extra]
    assert code == 2, err
    assert out == ""
    assert f"pip install 'moescope[{extra}]'" in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert made == [], "nothing may be recorded or made before the extra is known to be missing"


def _refusal(folder: Path, code: str) -> str:
    tail = "\nexcept ms.InputError as refused:\n    print(refused)\nelse:\n    raise SystemExit('not refused')\n"
    body = "".join(f"    {line}\n" for line in code.splitlines())
    return _without_extras(f"import moescope as ms\ntry:\n{body}{tail}", folder)


def test_a_table_for_polars_names_its_extra(folder: Path) -> None:
    code = "with ms.Store('runs.duckdb') as store:\n    ms.analyze(store.run('base'), 'load', allow_incomplete=True).polars()"
    assert "pip install 'moescope[polars]'" in _refusal(folder, code)


@pytest.mark.slow
def test_tracing_a_model_names_its_extra(folder: Path) -> None:
    code = "with ms.load('demo').trace('one two'):\n    pass"
    assert "pip install 'moescope[nnsight]'" in _refusal(folder, code)


@pytest.mark.slow
def test_every_module_outside_the_dashboard_loads_without_an_extra(folder: Path) -> None:
    import moescope

    root = Path(moescope.__file__).parent.parent
    names = []
    for part in ("moescope", "store", "probes", "routing", "sae"):
        for path in sorted((root / part).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            names.append(name if part == "moescope" else f"moescope.{name}")
    # These are subclasses of SAELens's own, loaded by functions that ask for the extra first; scripts run when loaded.
    left_out = {"moescope.sae.training.sparse_topk", "moescope.sae.training.transcoders"}
    code = "import importlib\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\nprint(len(sys.argv))\n"
    kept = [name for name in names if name not in left_out and not name.endswith("__main__")]
    assert len(kept) > 400
    assert _without_extras(code, folder, *kept).strip() == str(len(kept) + 1)
