"""The notebooks of docs/: they are their sources, run whole, end in a figure, and carry nothing of the machine that ran them."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import resource
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"


# What the prose of each notebook says of its numbers, asked in its own kernel after its last cell.
SAID = {
    "01-first-look": """
assert len(ledger.status.unique()) == 1 and (ledger.expected == ledger.recorded).all()
model_nats, counts_nats, nothing_nats = baselines.values()
assert model_nats < counts_nats - 1 < nothing_nats - 1
assert (special.df().q < 0.05).sum() >= 50 and special.df().lift.max() > 4
gained = table.groupby("given")["over shuffled"].mean()
assert gained.idxmax() == "token id" and gained["token id"] > 3 * gained["label"] and gained["position"] < 0.1
by_layer = table[table.given == "token id"].set_index("layer")["over shuffled"]
assert by_layer.idxmax() == 0
""",
    "02-consistency-and-caches": """
at_random, at_fixed, of_model = srp("random"), srp("fixed"), srp("base")
assert abs(at_random.value - at_random.null) < 0.01 and at_fixed.value > 0.999
assert at_fixed.value - of_model.value > of_model.value - of_model.null > 4 * (of_model.ci_high - of_model.ci_low)
gained = rungs.astype(float).diff()
assert gained.idxmax() == "shuffled within labels" and gained["as it ran"] > gained["shuffled within documents"] > 0
assert 0 <= gained["all tokens shuffled"] < 0.01
assert rows.loc["excess over shuffled in sequence", "ci_low"] > 0
assert 0.35 < hits["value"].loc["lru", 4] < 0.6 and hits["null"].loc["lru", 4] < 0.3
assert hits["value"].loc["belady", 4] == hits["value"][4].max()
held = summary.set_index(["metric", "placement"])
assert held.loc[("crossings a token", "affinity"), "value"] < held.loc[("crossings a token", "affinity"), "null_low"]
even = held.loc[("busiest ÷ mean device", "anti-correlation")]
assert even["value"] < even["null_low"]
""",
    "03-who-is-this-expert": """
assert (layer, expert, label) == (4, 14, "german") and first.q < 0.05
same = again.query("layer == @layer and expert == @expert and label == @label").iloc[0]
assert same.value > 3 * same.null
assert ((both.share_inside > both.share_outside).mean() > 0.8) and (both.share_outside < 0.1).mean() > 0.8
kinds = of_labels.set_index("label")
assert kinds.loc[label, "ci_low"] > kinds.loc[label, "control_high"]
assert kinds.drop(label).value.abs().max() < 0.1 * kinds.loc[label, "value"]
assert kinds.loc[label, "value"] < 1
""",
    "04-massive-activations-to-sinks": """
if smollm2:
    assert writers["share of the block"].head(2).sum() > 0.9 and writers["share of the block"].iloc[2:].abs().max() < 0.01
    assert of_layer[layer - 8] > 0.5 and of_layer[layer] < 0.2 and of_layer[layer + 2] > 0.5
    assert ratio[: layer - 1].max() < 1000 < ratio[layer]
    shares, nats = answer["sinks, share of (text, head)"], answer["NLL, nats"]
    assert shares["cut"] < 0.7 * shares["control"] and nats["cut"] > nats["control"] + 0.5
    assert abs(shares["control"] - shares["base"]) < 0.05 and abs(nats["control"] - nats["base"]) < 0.1
    assert abs(shares["constant"] - shares["base"]) < 0.05 and abs(nats["constant"] - nats["base"]) < 0.1
before = [
    ms.analyze(run, "attention_sinks", shorter=True).df().query("metric == 'Sink_k of layer' and layer <= @layer").value
    for run in runs.values()
]
assert all((other.to_numpy() == before[0].to_numpy()).all() for other in before)
""",
    "05-features-and-steering": """
table = judged.pivot_table(index="condition", columns="metric", values="value")
assert (table.idxmin() == "sae").all()
assert table.fvu["pca_topk"] < table.fvu["pca"]
mine = written[written.feature == latent].iloc[0]
assert mine.layer == 4 and mine.expert == 14 and mine.value > mine.null
effects = answer.query("metric == 'target effect'").set_index("strength")
assert (effects.value[[0.5, 1, 2]] > effects.control_high[[0.5, 1, 2]]).all()
""",
}


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


execute = _script()
each = pytest.mark.parametrize("name", execute.NAMES)


def _saved(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _kinds(cell: Any) -> set[str]:
    return {kind for output in cell.outputs for kind in output.get("data", {})}


def _is_figure(cell: Any) -> bool:
    return bool(_kinds(cell) & {"image/png", "application/vnd.plotly.v1+json"})


def test_there_are_five_and_no_other_notebook() -> None:
    assert len(execute.NAMES) == 5
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(execute.NAMES)


@each
def test_notebook_is_valid_and_of_the_format_with_cell_ids(name: str) -> None:
    notebook = _saved(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


@each
def test_notebook_holds_the_cells_of_its_source(name: str) -> None:
    assert [(cell.cell_type, cell.source) for cell in _saved(name).cells] == execute.cells(name)


@each
def test_saved_outputs_come_from_one_run_from_top_to_bottom(name: str) -> None:
    cells = _code(_saved(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.output_type in {"execute_result", "display_data"} for cell in cells for output in cell.outputs)
    for cell in cells:
        last = ast.parse(cell.source).body[-1]
        assert bool(cell.outputs) == isinstance(last, ast.Expr), cell.source


@each
def test_notebook_ends_in_a_figure_that_any_viewer_can_show(name: str) -> None:
    last = _code(_saved(name))[-1]
    assert "image/png" in _kinds(last)


@each
def test_every_code_cell_has_prose_before_it_or_continues_one(name: str) -> None:
    cells = _saved(name).cells
    kinds = [cell.cell_type for cell in cells]
    assert kinds[0] == kinds[-1] == "markdown"
    assert "code code code" not in " ".join(kinds), "at most two cells of code between two passages of text"
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert text.count("**Question:**") >= 3
    assert text.count("would refute") >= 3
    assert text.count("**How to read it:**") >= 3
    assert "## What next" in cells[-1].source


@each
def test_notebook_carries_nothing_of_the_machine_and_nothing_from_the_network(name: str) -> None:
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    without_pictures = re.sub(r'"image/png": "[^"]*"', "", text)
    for place in ("/home/", "/root/", "/tmp/", "/work/", "/Users/", str(Path.home())):
        assert place not in without_pictures, place
    assert not re.search(r"<script|<iframe|cdn\.|unpkg|jsdelivr|googleapis|google-analytics", without_pictures)
    assert not re.search(r"\d:\d\d:\d\d|tokens/s|\bseconds? elapsed", without_pictures)
    links = set(re.findall(r"https?://[^\s\"')\\>]+", without_pictures))
    assert all(link.startswith("https://arxiv.org/abs/") for link in links), links


@each
def test_every_name_used_of_moescope_is_there(name: str) -> None:
    import moescope as ms

    code = "\n".join(cell.source for cell in _code(_saved(name)))
    text = "\n".join(cell.source for cell in _saved(name).cells)
    used = set(re.findall(r"\bms((?:\.\w+)+)", text))
    assert used
    for chain in used:
        found: Any = ms
        for part in chain[1:].split("."):
            found = getattr(found, part)
    asked = set(re.findall(r"ms\.analyze\([^()]*?,\s*\"(\w+)\"", code))
    assert asked <= set(ms.analyses().name)


@each
def test_links_of_the_notebook_and_the_list_lead_somewhere(name: str) -> None:
    text = "\n".join(cell.source for cell in _saved(name).cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (FOLDER / link).is_file(), link
    assert f"({name}.ipynb)" in (FOLDER / "index.md").read_text(encoding="utf-8")


@pytest.mark.slow
@each
def test_notebook_runs_from_top_to_bottom_and_ends_in_a_figure(name: str, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in FOLDER.rglob("*") if path.is_file()}
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    made = execute.executed(name, folder=tmp_path, then=SAID[name])
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert _is_figure(_code(made)[-2])
    assert not list(tmp_path.iterdir()), "a notebook writes to a folder of its own"
    assert {path: path.stat().st_mtime_ns for path in FOLDER.rglob("*") if path.is_file()} == before
    json.dumps(made)
    # Processor time of the kernel, since tests beside this one take their share of the cores.
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < execute.SECONDS
