"""Where a run's numbers come from, and what was not recorded with the probe that would have."""

from __future__ import annotations

import json
from typing import Any

import dash_mantine_components as dmc

from moescope.core.analysis import PROBE_OF_TABLE
from moescope.dashboard import cards, numbers
from moescope.store.run import Run

_RECORDS = {
    "tokens": "tokens with their likelihoods",
    "routing": "decisions of routers",
    "router_logits": "scores of every expert",
    "experts": "output norms and maxima by expert",
    "expert_outputs": "output norms of every decision",
    "residual": "norms and largest activations of the residual stream",
    "head_sequences": "attention scores by head",
    "activations": "vectors at chosen sites",
}
_OF_EXPERTS = {"routing", "router_logits", "experts", "expert_outputs"}


def provenance(run: Run, info: dict[str, Any], *, moe: bool) -> Any:
    """Model, corpus, seed and times; versions and settings; what is missing."""
    return dmc.Stack(
        [
            dmc.SimpleGrid(
                [
                    cards.section("Run", cards.facts(_facts(info))),
                    cards.section("Versions and settings", cards.facts(_surroundings(info))),
                ],
                cols={"base": 1, "lg": 2},
                spacing="xl",
            ),
            cards.section("Not recorded", _missing(run, moe=moe), identity="not-recorded"),
        ],
        gap="xl",
    )


def not_recorded(run: Run, *, moe: bool) -> list[tuple[str, str, str]]:
    """Table, what it would hold and the probe that writes it, for every table the run has nothing in."""
    missing = []
    for table, what in _RECORDS.items():
        if (moe or table not in _OF_EXPERTS) and not run.table(table).limit(1).fetchall():
            missing.append((table, what, PROBE_OF_TABLE.get(table, table)))
    return missing


def _missing(run: Run, *, moe: bool) -> Any:
    missing = not_recorded(run, moe=moe)
    if not missing:
        return dmc.Text("Every probe's records are there.", className="muted")
    rows = [
        dmc.TableTr([dmc.TableTd(what), dmc.TableTd(dmc.Code(f"--probe {probe}")), dmc.TableTd(table)])
        for table, what, probe in missing
    ]
    head = dmc.TableTr([dmc.TableTh(word) for word in ("What", "Recorded by", "Table")])
    return dmc.Table(
        [dmc.TableThead(head), dmc.TableTbody(rows)],
        className="facts ov-missing",
        verticalSpacing=5,
        withRowBorders=True,
    )


def _facts(info: dict[str, Any]) -> list[tuple[str, Any]]:
    rows = [
        ("Name", info["name"]),
        ("Model", info["model"]),
        ("Revision", info["revision"]),
        ("Architecture", info["architecture"]),
        ("Parameters", numbers.count(info["anatomy"].get("parameters"))),
        ("Corpus", info["settings"].get("corpus")),
        ("Corpus fingerprint", info["corpus_fingerprint"]),
        ("Seed", info["seed"]),
        ("Intervention", json.dumps(info["intervention"], ensure_ascii=False) if info["intervention"] else "none"),
        ("Begun", _time(info["started_at"])),
        ("Ended", _time(info["finished_at"])),
        ("Run id", str(info["run_id"])),
    ]
    if stopped := info["summary"].get("stopped"):
        rows.append(("Stopped", stopped))
    return [(name, numbers.MISSING if value is None else str(value)) for name, value in rows]


def _surroundings(info: dict[str, Any]) -> list[tuple[str, Any]]:
    rows = [(name, str(version)) for name, version in info["versions"].items()]
    rows += [
        (name.replace("_", " "), (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value))
        for name, value in info["settings"].items()
        if name not in ("corpus", "intervention")  # told with the run
    ]
    return rows or [("Versions", "not recorded")]


def _time(moment: Any) -> str:
    return numbers.MISSING if moment is None else f"{moment:%Y-%m-%d %H:%M:%S} UTC"
