"""What differs in how two runs were made, setting by setting."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.dashboard.browser import HIDDEN
from moescope.dashboard.overview.runs_grid import intervention_words
from moescope.dashboard.overview.value_cards import duration
from moescope.dashboard.records import routers
from moescope.store.run import Run

_CIRCUMSTANCES = {"recorded", "took", "batch size", "threads"}
"""Told among all rows; they do not make two runs different ones."""


@dataclass(frozen=True)
class Setting:
    """One setting of two runs; `matters` where a difference in it is one of configuration."""

    name: str
    first: str
    second: str
    matters: bool = True

    @property
    def changed(self) -> bool:
        """Whether the two differ in it."""
        return self.first != self.second


def settings(run: Run, other: Run) -> list[Setting]:
    """Every setting that one of the two has, in one order."""
    first, second = _told(run), _told(other)
    names = [*first, *(name for name in second if name not in first)]
    missing = "not recorded"
    return [Setting(n, first.get(n, missing), second.get(n, missing), n not in _CIRCUMSTANCES) for n in names]


def configuration_table(run: Run, other: Run, *, every: bool) -> Any:
    """The settings as a table: the changed ones, or all with the changed ones marked."""
    known = settings(run, other)
    shown = known if every else [row for row in known if row.changed and row.matters]
    if not shown:
        return dmc.Text(
            f"Nothing: all {len(known)} settings are the same, but for when they were recorded.", className="muted"
        )
    head = dmc.TableTr(
        [dmc.TableTh(word) for word in ("Setting", html.Span("Changed", className="cmp-unseen"), run.name, other.name)]
    )
    return dmc.Table(
        [dmc.TableThead(head), dmc.TableTbody([_line(row, every=every) for row in shown])],
        className="facts cmp-settings",
        verticalSpacing=5,
        withRowBorders=True,
    )


def _line(row: Setting, *, every: bool) -> Any:
    mark = [html.Span("≠", **HIDDEN), html.Span("changed", className="cmp-unseen")] if row.changed else None
    tint = "cmp-changed" if row.changed and every else ""
    return dmc.TableTr(
        [
            dmc.TableTh(row.name, className="fact-name"),
            dmc.TableTd(mark, className="cmp-mark"),
            dmc.TableTd(row.first, className="foreign"),
            dmc.TableTd(row.second, className=f"foreign {tint}".strip()),
        ]
    )


def _told(run: Run) -> dict[str, str]:
    info, summary = run.info, run.info["summary"]
    known = routers(run)
    sizes = sorted({f"{r.experts} experts, top-{r.top_k}" for r in known})
    given = {
        "intervention": intervention_words(json.dumps(info["intervention"]) if info["intervention"] else None),
        "edits": json.dumps(info["intervention"].get("edits"), ensure_ascii=False) if info["intervention"] else "none",
        "model": info["model"],
        "revision": info["revision"],
        "architecture": info["architecture"],
        "routers": f"{len(known)} of {', '.join(sizes)}" if known else "none: dense",
        "corpus": info["settings"].get("corpus"),
        "corpus fingerprint": info["corpus_fingerprint"],
        "seed": info["seed"],
        "status": run.status,
        "stopped": summary.get("stopped"),
    }
    given |= {f"anatomy: {name.replace('_', ' ')}": value for name, value in info["anatomy"].items()}
    given |= {name: summary.get(name) for name in ("documents", "sequences", "tokens")}
    given |= {
        name.replace("_", " "): value
        for name, value in info["settings"].items()
        if name not in ("corpus", "intervention")
    }
    given |= {f"version of {name}": value for name, value in info["versions"].items()}
    given["recorded"] = f"{info['started_at']:%Y-%m-%d %H:%M:%S} UTC" if info["started_at"] else None
    given["took"] = duration(summary["seconds"]) if summary.get("seconds") is not None else None
    return {name: _written(value) for name, value in given.items() if value is not None}


def _written(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
