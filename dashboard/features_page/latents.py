"""The latents of one autoencoder on one run as a searchable list: each with its tokens, label, score, description and writer."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moescope.dashboard.features_page.readings import Reading
from moescope.dashboard.records import expert_name
from moescope.dashboard.token_text import PieceReader, brief
from moescope.routing.context import pieces
from moescope.routing.features.feature_tables import RULE_NAMES
from moescope.routing.grid import layer_name
from moescope.store.run import Run

_SQL = """
    WITH labelled AS (
        SELECT feature, label, lift, ci_low, ci_high, q
        FROM feature_labels
        WHERE run_id = $run AND sae_id = $sae AND q < 0.05 AND lift > 1
        QUALIFY row_number() OVER (PARTITION BY feature ORDER BY lift DESC, label) = 1
    ),
    scored AS (
        SELECT group_value::INTEGER AS feature, metric AS rule, value AS score
        FROM sae_measures
        WHERE run_id = $run AND sae_id = $sae AND group_kind = 'feature' AND condition = 'sae' AND metric IN (
            'predicted_by_token', 'predicted_by_previous_token', 'predicted_by_label'
        )
        QUALIFY row_number() OVER (PARTITION BY group_value ORDER BY value DESC NULLS LAST, metric) = 1
    ),
    peaks AS (
        SELECT c.feature, t.token_id, count(*) AS times
        FROM feature_contexts c
        JOIN tokens t ON t.run_id = c.run_id AND t.sequence_id = c.sequence_id AND t.position = c.position
        WHERE c.run_id = $run AND c.sae_id = $sae AND c.stratum = 0
        GROUP BY c.feature, t.token_id
    ),
    tops AS (
        SELECT feature, list(token_id ORDER BY times DESC, token_id)[:6] AS peak_ids
        FROM peaks
        GROUP BY feature
    ),
    written AS (
        SELECT feature, layer, block, expert
        FROM feature_experts
        WHERE run_id = $run AND sae_id = $sae AND metric = 'writes_excess'
        QUALIFY row_number() OVER (PARTITION BY feature ORDER BY value DESC, layer, expert) = 1
    ),
    told AS (
        SELECT unit AS feature, string_agg(text, ' · ' ORDER BY created_at DESC, describer) AS description
        FROM descriptions
        WHERE run_id = $run AND sae_id = $sae AND unit_kind = 'latent'
        GROUP BY unit
    )
    SELECT f.feature, f.active, f.tokens, f.active / f.tokens AS density, f.maximum, p.peak_ids, f.raised_ids[:4] AS raised_ids,
        l.label, l.lift, l.ci_low AS lift_low, l.ci_high AS lift_high, l.q, s.rule, s.score, w.layer, w.block, w.expert,
        d.description
    FROM features f
    LEFT JOIN labelled l USING (feature)
    LEFT JOIN scored s USING (feature)
    LEFT JOIN tops p USING (feature)
    LEFT JOIN written w USING (feature)
    LEFT JOIN told d USING (feature)
    WHERE f.run_id = $run AND f.sae_id = $sae
    ORDER BY f.feature
"""
_KEPT = 4


@dataclass(frozen=True)
class Page:
    """Some rows of the list.

    Attributes:
        rows: of the window that was asked for.
        found: rows that the search and the filters leave.
    """

    rows: list[dict[str, Any]]
    found: int


class LatentLists:
    """Lists of latents, kept for the autoencoders looked at last; safe for many threads."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str, int], pd.DataFrame] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, run: Run, reading: Reading, revision: int) -> pd.DataFrame:
        """The list of an autoencoder on a run, as it was at a revision of the store."""
        key = (run.run_id, reading.sae_id, revision)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = latent_list(run, reading)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]


def latent_list(run: Run, reading: Reading) -> pd.DataFrame:
    """One row a latent, with a column `search` of everything that a search looks through, in small letters."""
    frame = run.sql(_SQL, {"sae": reading.sae_id}).df()
    reader = PieceReader(pieces(run))

    def words(ids: Any) -> str:
        return "" if not hasattr(ids, "__len__") else "  ".join(brief(reader.alone(int(i)), 24) for i in ids)

    frame["peaks"] = [words(ids) for ids in frame["peak_ids"]]
    frame["raised"] = [words(ids) for ids in frame["raised_ids"]]
    frame["writer"] = [
        None if pd.isna(e) else f"{layer_name(int(layer), str(block))}·{expert_name(int(e))}"
        for layer, block, e in zip(frame["layer"], frame["block"], frame["expert"], strict=True)
    ]
    frame["lift_bounds"] = [
        None if pd.isna(low) or pd.isna(high) else f"[{low:.2f}, {high:.2f}]"
        for low, high in zip(frame["lift_low"], frame["lift_high"], strict=True)
    ]
    frame["rule"] = frame["rule"].map(RULE_NAMES)
    parts = [frame[name].fillna("").astype(str) for name in ("peaks", "raised", "label", "description", "writer")]
    frame["search"] = parts[0].str.cat(parts[1:], sep="\n").str.lower()
    return frame.drop(columns=["peak_ids", "raised_ids", "lift_low", "lift_high", "layer", "block", "expert"])


def page(
    frame: pd.DataFrame,
    *,
    text: str = "",
    sort: list[dict[str, str]] | None = None,
    filters: dict[str, Any] | None = None,
    start: int = 0,
    end: int = 100,
) -> Page:
    """Rows `start` to `end` of those that hold a text and pass the filters, in the order asked for.

    Args:
        frame: a list of latents.
        text: looked for in tokens, labels, descriptions and writers; a whole number also finds the latent of that number.
        sort: AG Grid's sort model; the best explained first where there is none.
        filters: AG Grid's filter model, of numbers and text.
        start, end: the window.
    """
    kept = frame
    wanted = text.strip().lower()
    if wanted:
        hit = kept["search"].str.contains(wanted, regex=False)
        if wanted.isdecimal():
            hit |= kept["feature"] == int(wanted[:9])
        kept = kept[hit]
    for name, asked in (filters or {}).items():
        if name in frame.columns and name != "search":
            kept = kept[_passes(kept[name], asked)]
    order = [s for s in (sort or []) if s.get("colId") in frame.columns]
    by = [s["colId"] for s in order] or ["score", "density"]
    rising = [s.get("sort") == "asc" for s in order] or [False, False]
    kept = kept.sort_values([*by, "feature"], ascending=[*rising, True], kind="stable", na_position="last")
    shown = kept.iloc[max(0, start) : max(0, end)].drop(columns="search")
    rows = shown.astype(object).where(shown.notna(), None).to_dict("records")
    return Page([{"id": str(row["feature"])} | {str(k): _plain(v) for k, v in row.items()} for row in rows], len(kept))


def _passes(values: pd.Series, asked: dict[str, Any]) -> pd.Series:
    """One filter of AG Grid over a column; one that is not known leaves everything."""
    if "conditions" in asked:
        parts = [_passes(values, each) for each in asked["conditions"][:4]]
        both = asked.get("operator") == "AND"
        found = parts[0]
        for part in parts[1:]:
            found = found & part if both else found | part
        return found
    kind, first, second = asked.get("type"), asked.get("filter"), asked.get("filterTo")
    if kind == "blank":
        return values.isna() | (values == "")
    if kind == "notBlank":
        return values.notna() & (values != "")
    if asked.get("filterType") == "number" and isinstance(first, (int, float)):
        high = second if isinstance(second, (int, float)) else first
        return {
            "equals": values == first, "notEqual": values != first, "greaterThan": values > first,
            "greaterThanOrEqual": values >= first, "lessThan": values < first, "lessThanOrEqual": values <= first,
            "inRange": (values >= first) & (values <= high),
        }.get(str(kind), values.isna() | True)  # fmt: skip
    text = values.fillna("").astype(str).str.lower()
    wanted = str(first or "").lower()
    return {
        "contains": text.str.contains(wanted, regex=False), "notContains": ~text.str.contains(wanted, regex=False),
        "equals": text == wanted, "notEqual": text != wanted, "startsWith": text.str.startswith(wanted),
        "endsWith": text.str.endswith(wanted),
    }.get(str(kind), values.isna() | True)  # fmt: skip


def _plain(value: Any) -> Any:
    """A value as JSON takes it."""
    return value.item() if hasattr(value, "item") else value
