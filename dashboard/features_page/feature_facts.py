"""What is on record of one latent: labels, logits, neighbours, descriptions, writers and what taking these out left."""

from __future__ import annotations

from typing import Any

from moescope.dashboard.features_page.readings import Reading
from moescope.routing.features.feature_tables import RULES
from moescope.store.run import Run

_FEATURE = """
    SELECT active, tokens, documents, mean, maximum, decoder_norm, raised_ids, raised, lowered_ids, lowered
    FROM features
    WHERE run_id = $run AND sae_id = $sae AND feature = $feature
"""
_LABELS = """
    SELECT label, active, tokens, lift, ci_low, ci_high, q
    FROM feature_labels
    WHERE run_id = $run AND sae_id = $sae AND feature = $feature AND lift IS NOT NULL
    ORDER BY lift DESC, label
"""
_LINKS = """
    SELECT l.kind, CASE WHEN l.feature = $feature THEN l.other_feature ELSE l.feature END AS other,
        CASE WHEN l.kind <> 'family' THEN NULL WHEN l.feature = $feature THEN 'member' ELSE 'parent' END AS role,
        s.name AS sae, l.other_sae_id = $sae AS same, l.value, l.ci_low, l.ci_high, l.null_value, l.null_kind, l.n
    FROM feature_links l
    LEFT JOIN saes s ON s.sae_id = l.other_sae_id
    WHERE l.run_id = $run AND l.sae_id = $sae AND (
        l.feature = $feature OR (l.other_feature = $feature AND l.other_sae_id = $sae AND l.kind IN ('coactivation', 'family'))
    )
    QUALIFY row_number() OVER (PARTITION BY l.kind ORDER BY l.value DESC, other) <= 8
    ORDER BY l.kind, l.value DESC, other
"""
_RULES = """
    SELECT s.metric, s.value, s.ci_low, s.ci_high, c.value AS null_value, s.n
    FROM sae_measures s
    LEFT JOIN sae_measures c ON c.run_id = s.run_id AND c.sae_id = s.sae_id AND c.metric = s.metric
        AND c.group_kind = s.group_kind AND c.group_value = s.group_value AND c.condition = 'shuffled'
    WHERE s.run_id = $run AND s.sae_id = $sae AND s.group_kind = 'feature' AND s.group_value = $feature::VARCHAR
        AND s.condition = 'sae' AND list_contains($rules, s.metric)
    ORDER BY s.value DESC
"""
_DESCRIPTIONS = """
    SELECT d.text, d.describer, s.metric, s.scorer, any_value(s.value) AS value, any_value(s.ci_low) AS ci_low,
        any_value(s.ci_high) AS ci_high, max(s.null_value) FILTER (s.null_kind = 'chance') AS chance,
        max(s.null_value) FILTER (s.null_kind LIKE 'another %') AS another, any_value(s.n) AS n, d.created_at
    FROM descriptions d
    LEFT JOIN description_scores s ON s.description_id = d.description_id AND NOT ends_with(s.metric, '_unread')
    WHERE d.run_id = $run AND d.sae_id = $sae AND d.unit_kind = 'latent' AND d.unit = $feature
    GROUP BY d.description_id, d.text, d.describer, d.created_at, s.metric, s.scorer
    ORDER BY d.created_at DESC, d.describer, s.metric
    LIMIT 24
"""
_EXPERTS = """
    SELECT layer, block, expert, metric, value
    FROM feature_experts
    WHERE run_id = $run AND sae_id = $sae AND feature = $feature AND expert IS NOT NULL
"""
_BOUNDS = """
    SELECT layer, block, expert, metric, ci_low, ci_high, null_value, null_kind, n
    FROM feature_experts
    WHERE run_id = $run AND sae_id = $sae AND feature = $feature AND expert IS NOT NULL AND metric IN ('writes_excess', 'gates_logit')
"""
_ABLATION = """
    SELECT metric, value, ci_low, ci_high, null_value, n
    FROM feature_experts
    WHERE run_id = $run AND sae_id = $sae AND feature = $feature AND expert IS NULL AND starts_with(metric, 'ablation')
    ORDER BY metric, value
"""


class FeatureFacts:
    """The records of one latent, each read when it is asked for.

    Args:
        run: whose tokens it was read on.
        reading: of which autoencoder.
        feature: number of the latent.
    """

    def __init__(self, run: Run, reading: Reading, feature: int) -> None:
        self.run, self.reading, self.feature = run, reading, feature

    def _rows(self, query: str, **more: Any) -> list[dict[str, Any]]:
        given = {"sae": self.reading.sae_id, "feature": self.feature, **more}
        rows: list[dict[str, Any]] = self.run.sql(query, given).to_arrow_table().to_pylist()
        return rows

    def whole(self) -> dict[str, Any] | None:
        """Counts, sizes and logits; None where there is no such latent."""
        rows = self._rows(_FEATURE)
        return rows[0] if rows else None

    def labels(self) -> list[dict[str, Any]]:
        """Lift of every label, the largest first."""
        return self._rows(_LABELS)

    def links(self) -> list[dict[str, Any]]:
        """Neighbours, by kind, the nearest first."""
        return self._rows(_LINKS)

    def rules(self) -> list[dict[str, Any]]:
        """How well simple rules predict it."""
        return self._rows(_RULES, rules=list(RULES))

    def descriptions(self) -> list[dict[str, Any]]:
        """Descriptions with their scores."""
        return self._rows(_DESCRIPTIONS)

    def experts(self) -> list[dict[str, Any]]:
        """Experts that write it or that it gates, the largest writer first; with bounds and nulls as `<metric>_low`, …"""
        bounds = self._rows(_BOUNDS)
        rows = {(r["layer"], r["block"], r["expert"]): r for r in self._pivoted()}
        for b in bounds:
            row = rows.get((b["layer"], b["block"], b["expert"]))
            if row is not None:
                name = b["metric"]
                row |= {
                    f"{name}_low": b["ci_low"],
                    f"{name}_high": b["ci_high"],
                    f"{name}_null": b["null_value"],
                    "n": b["n"],
                }
        return sorted(rows.values(), key=lambda r: -(r.get("writes_excess") or float("-inf")))

    def ablation(self) -> list[dict[str, Any]]:
        """What taking its writers out left of it, and the same with matched experts."""
        return self._rows(_ABLATION)

    def _pivoted(self) -> list[dict[str, Any]]:
        found: dict[tuple[int, str, int], dict[str, Any]] = {}
        for row in self._rows(_EXPERTS):
            place = (row["layer"], row["block"], row["expert"])
            found.setdefault(place, {"layer": place[0], "block": place[1], "expert": place[2]})[row["metric"]] = row[
                "value"
            ]
        return list(found.values())
