"""What is not in a report, why, and the command that would fill it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence

from moescope.core.analysis import PROBE_OF_TABLE, Analysis
from moescope.report.document import Block, Cell, Grid, Heading, Paragraph
from moescope.store.run import Run

_READ = "moescope sae read --store {store} --sae NAME --run {run} --model {model}"
_EXPERTS = "moescope sae experts --store {store} --sae NAME --model {model} --run {run}"
_SAE = {
    **dict.fromkeys(("features", "feature_contexts", "feature_labels", "feature_links"), _READ),
    "sae_measures": "moescope sae judge --store {store} --sae NAME --model {model} --run {run}",
    "feature_experts": _EXPERTS,
    "sparse_probes": "moescope sae probe --store {store} --run {run} --units expert",
    **dict.fromkeys(
        ("descriptions", "description_scores"),
        "moescope sae describe --store {store} --run {run} --sae NAME --unit NUMBER --command COMMAND",
    ),
    "mlp_students": "moescope sae students {model} --layer LAYER --store {store} --run {run}",
}
_OURS = {
    "heads": "moescope phenomena {model} --store {store}",
    "head_sequences": "moescope phenomena {model} --store {store}",
}
_EDIT = '--edit "ablate layer=3 experts=5"'
_EFFECT = f"moescope intervene effect {{model}} --store {{store}} {_EDIT} --base {{run}}"
_SWEEP = "moescope intervene sweep {model} --store {store} --base {run} --kind "
# Which command measures the effects that an analysis reads; `_EFFECT` for the others.
_EFFECTS_OF = {
    "expert_effects": f"{_SWEEP}experts",
    "score_agreement": f"{_SWEEP}experts",
    "drop_curves": f"{_SWEEP}drop",
    "keep_curves": f"{_SWEEP}keep",
    "routing_width": f"{_SWEEP}top_k",
    "routing_value": f"{_SWEEP}routing_value",
    "dose_response": f"{_SWEEP}dose {_EDIT}",
    "steering_dose": "moescope sae steer {model} --store {store} --base {run} --sae NAME --feature NUMBER=+5 --target TOKEN",
}
# Analyses that read rows which another command than their table's writes.
_OF_ANALYSIS = {
    "feature_association": _READ,
    "expert_sparsity_routing": f"{_EXPERTS} --sparsity",
    "neurons_against_sae": f"{_EXPERTS} --neurons",
    "head_circuit": "moescope sae circuit {model} --store {store}",
}


def command_for(analysis: str, missing: Sequence[str], run: Run, store: str) -> str:
    """The command that records what tables lack for an analysis; empty where nothing is missing.

    Only its beginning where a choice is the reader's: which autoencoder, which intervention.
    """
    if not missing:
        return ""
    names = {
        "model": shlex.quote(run.model),
        "store": shlex.quote(store),
        "run": shlex.quote(run.name),
    }
    if "effects" in missing:
        return _EFFECTS_OF.get(analysis, _EFFECT).format(**names)
    if pattern := _OF_ANALYSIS.get(analysis):
        return pattern.format(**names)
    for table in missing:
        if pattern := _SAE.get(table) or _OURS.get(table):
            return pattern.format(**names)
    probes = sorted({PROBE_OF_TABLE.get(table, table) for table in missing})
    name = shlex.quote(f"{run.name} again")
    return f"moescope profile {names['model']} --store {names['store']} --name {name} --probe {','.join(probes)}"


def left_out_row(analysis: Analysis, runs: Sequence[Run], reason: str, stores: Mapping[str, str]) -> dict[str, str]:
    """One analysis that is not in the report; `stores` are run_id → path, as commands name it."""
    lacking = next(((run, missing) for run in runs if (missing := analysis.missing(run))), None)
    for run in runs:  # where a store lies is no reason, and changes when it is moved
        folder = run.store.path.parent
        reason = reason if str(folder) == "." else reason.replace(f"{folder}/", "")
    command = command_for(analysis.name, lacking[1], lacking[0], stores[lacking[0].run_id]) if lacking else ""
    return {"analysis": analysis.name, "reason": reason, "command": command}


def left_out_blocks(rows: Sequence[dict[str, str]], others: Iterable[tuple[str, str]]) -> list[Block]:
    """The table at the end of a report; `others` are kinds of questions that it leaves to other commands."""
    blocks: list[Block] = []
    if rows:
        grid = Grid(
            ("analysis", "why it is not here", "what would fill it"),
            [(Cell(row["analysis"]), Cell(row["reason"]), Cell(row["command"])) for row in rows],
        )
        blocks += [Heading("Not in this report", "not-in-this-report"), grid]
    others = list(others)
    if others:
        blocks += [
            Heading("Told by other reports", "other-reports"),
            Grid(("question", "command"), [(Cell(question), Cell(command)) for question, command in others]),
        ]
    if any("NAME" in row["command"] for row in rows):
        blocks.append(Paragraph("NAME: of an autoencoder in the store (moescope sae list STORE).", "muted"))
    return blocks
