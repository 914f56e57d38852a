"""What was run, and in which settings two runs differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moescope.core.html import cell
from moescope.report.document import Block, Cell, Grid, Heading, Paragraph, facts_grid
from moescope.report.leaderboard import labels_of
from moescope.routing.effects.stored_effects import subject
from moescope.store.run import Run

_CIRCUMSTANCES = ("recorded", "took")
"""Told, but no change of configuration."""


def run_blocks(run: Run, *, anchor: str) -> list[Block]:
    """What was run, with a warning where the run is not whole."""
    info, summary = run.info, run.info["summary"]
    blocks: list[Block] = [Heading(f"Run {run.name}", anchor)]
    if info["status"] != "complete":
        stopped = str(summary.get("stopped") or "")
        blocks.append(
            Paragraph(
                f"⚠ This run is {info['status']}. {stopped} Numbers below rest on what was recorded; "
                "the ledger says what is missing.",
                "warning",
            )
        )
    return [*blocks, facts_grid([(k, cell(v)) for k, v in _facts(run, info, summary).items()])]


def _facts(run: Run, info: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    settings, anatomy = info["settings"], info["anatomy"]
    layers, experts, top_k = run.store.fetch(
        "SELECT count(*), max(n_experts), max(top_k) FROM layers WHERE run_id = ? AND kind = 'moe'", [run.run_id]
    )[0]
    routers = f"{layers} MoE layers of {experts} experts, top-{top_k}" if layers else "dense: no routers, no experts"
    facts = {
        "Model": info["model"],
        "Revision": info["revision"] or "not known",
        "Architecture": f"{info['architecture']}, {anatomy.get('n_layers')} layers, {routers}",
        "Parameters": anatomy.get("parameters"),
        "Intervention": _intervention(info),
        "Corpus": settings.get("corpus"),
        "Corpus fingerprint": info["corpus_fingerprint"],
        "Documents": summary.get("documents"),
        "Sequences": summary.get("sequences"),
        "Tokens": summary.get("tokens"),
        "Status": info["status"],
        "Speed": f"{summary.get('tokens_per_second', 0):,.0f} tokens/s, records included",
        "Probes": ", ".join(settings.get("probes", [])),
        "Batches": f"{settings.get('batch_size')} sequences of at most {settings.get('max_length')} tokens",
        "Device and type": f"{settings.get('device')}, {settings.get('dtype')}, experts "
        f"{settings.get('experts')}, attention {settings.get('attention')}, {settings.get('threads')} threads",
        "Seed": info["seed"],
        "Versions": ", ".join(f"{k} {v}" for k, v in info["versions"].items()),
        "Recorded": f"{info['started_at']:%Y-%m-%d %H:%M} UTC" if info["started_at"] else None,
        "Said on the way": _said(summary),
    }
    return facts if settings else {k: v for k, v in facts.items() if k not in ("Speed", "Batches", "Device and type")}


def _said(summary: Mapping[str, Any]) -> str:
    notes = []
    if count := summary.get("split_documents"):
        notes.append(f"{count} documents were longer than a sequence and split")
    if count := summary.get("single_token_sequences"):
        notes.append(f"{count} sequences have one token, which nothing predicts")
    if count := summary.get("skipped_records"):
        notes.append(f"{count} unreadable records were skipped, the first: {summary.get('first_skipped')}")
    return "; ".join(notes) or "nothing"


def changed_settings(runs: list[Run]) -> list[Block]:
    """The settings in which runs differ, as a table: a row a setting, a column a run."""
    told = [_settings(run) for run in runs]
    names = list(dict.fromkeys(name for settings in told for name in settings))
    rows, same = [], 0
    for name in names:
        values = [settings.get(name, "not recorded") for settings in told]
        if name in _CIRCUMSTANCES:
            continue
        if len(set(values)) == 1:
            same += 1
            continue
        rows.append([Cell(name), *map(Cell, values)])
    heading = Heading("What changed in configuration", "configuration")
    if not rows:
        return [heading, Paragraph(f"Nothing: all {same} settings are the same.")]
    grid = Grid(("setting", *labels_of(runs)), rows)
    return [heading, grid, Paragraph(f"The other {same} settings are the same.", "muted")]


def _settings(run: Run) -> dict[str, str]:
    info, summary = run.info, run.info["summary"]
    routers = run.store.fetch(
        "SELECT n_experts, top_k, count(*) FROM layers WHERE run_id = ? AND kind = 'moe' GROUP BY ALL ORDER BY ALL",
        [run.run_id],
    )
    given = {
        "intervention": _intervention(info),
        "model": info["model"],
        "revision": info["revision"],
        "architecture": info["architecture"],
        "routers": "; ".join(f"{n} of {e} experts, top-{k}" for e, k, n in routers) or "none: dense",
        "corpus": info["settings"].get("corpus"),
        "corpus fingerprint": info["corpus_fingerprint"],
        "seed": info["seed"],
        "status": info["status"],
        **{name: summary.get(name) for name in ("documents", "sequences", "tokens")},
        **{f"anatomy: {name.replace('_', ' ')}": value for name, value in info["anatomy"].items()},
        **{
            name.replace("_", " "): value
            for name, value in info["settings"].items()
            if name not in ("corpus", "intervention")
        },
        **{f"version of {name}": value for name, value in info["versions"].items()},
    }
    return {name: _written(value) for name, value in given.items() if value is not None}


def _intervention(info: Mapping[str, Any]) -> str:
    return subject(json.dumps(info["intervention"])) if info["intervention"] else "none"


def _written(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return cell(value)
